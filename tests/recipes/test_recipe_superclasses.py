import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

import normswap
from recipes import superclasses
from recipes.__main__ import main
from recipes.common import scores
from recipes.common.data import Loader
from recipes.common.digits import load_digits
from recipes.common.errors import RecipeError
from recipes.common.grid import read_lines
from recipes.superclasses import DIGITS, with_clusters, with_superclasses


@pytest.fixture(scope="module")
def digits():
    return load_digits(16, seed=0, limit=200, angles=(0,))


def loader_of(data):
    return Loader(data, (0.5,) * 3, (0.5,) * 3, 8, torch.device("cpu"))


def test_the_smoke_setting_runs_every_method_and_reports(tmp_path, capsys):
    given = ["superclasses", "--smoke", "--model", "test_resnet", "--out", str(tmp_path)]
    given += ["--name", "run", "--image-size", "16"]
    assert main(given) == 0

    folder = tmp_path / "run"
    found = read_lines(folder / "results.jsonl")
    by_method = {r["cell"]["method"]: r for r in found}
    assert list(by_method) == list(superclasses.METHODS)
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "epochs.jsonl", "results.jsonl", "results.png", "report.txt", "table.json",
    }  # fmt: skip
    columns = {"plain", "leaky", "assigned", "pooled", "posterior"}
    assert {name: columns & set(r) for name, r in by_method.items()} == {
        "bn": {"plain"},
        "cn-superclass": {"leaky", "pooled", "posterior"},
        "cn-x-superclass": {"leaky", "pooled", "posterior"},
        "cn-kmeans": {"assigned", "pooled", "posterior"},
        "cn-x-kmeans": {"assigned", "pooled", "posterior"},
    }
    assert by_method["bn"]["masked"] > by_method["bn"]["plain"]
    output = capsys.readouterr().out
    assert "LEAKY: true superclass" in output
    assert "bn + mask" in output


def test_superclasses_are_read_off_the_classes(digits):
    data = with_superclasses(digits, DIGITS)
    assert data.domain_names == ["curved", "round", "straight"]
    expected = ["curved" if c in (2, 3, 5) else "round" if c in (0, 6, 8, 9) else "straight"
                for c in digits.labels.tolist()]  # fmt: skip
    assert [data.domain_names[d] for d in data.domains] == expected


@pytest.mark.parametrize(
    "given",
    [
        ["round=0,6,8,9", "other=1,2,3,4,5,7,0"],
        ["round=0,6,8,9,10"],
        ["0,6,8,9"],
        ["=0"],
        ["round="],
    ],
)
def test_superclasses_of_another_form_are_an_error(digits, given):
    with pytest.raises(RecipeError, match="with each class of the data once"):
        with_superclasses(digits, given)


def test_clusters_are_found_on_training_images_and_assigned_by_nearness(digits):
    data, text = with_clusters(loader_of(with_superclasses(digits, DIGITS)), "pixels", 4, seed=0)

    pixels = digits.images.float().flatten(1).numpy() / 127.5 - 1
    fitted = KMeans(4, n_init=4, random_state=0).fit(pixels[digits.train.numpy()])
    distance = ((pixels[:, None] - fitted.cluster_centers_) ** 2).sum(2)
    nearest = distance.argmin(1)
    # The same partition, whatever the clusters are called.
    pairs = set(zip(data.domains.tolist(), nearest.tolist(), strict=True))
    assert len(pairs) == 4
    sizes = [sum(int(word) for word in part.split(":")[1].replace(",", "").split()[::2])
             for part in text.split(";")]  # fmt: skip
    assert sizes == np.bincount(data.domains[digits.train]).tolist()


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_scores_are_of_the_label_that_is_told_or_of_the_policy(digits, method):
    data = with_superclasses(digits, DIGITS)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
        torch.nn.Linear(4 * 14 * 14, 10),
    )  # fmt: skip
    loader = loader_of(data)
    x = loader.normalised(data.images[data.test])
    contexts = data.domains[data.test]
    wanted = {}
    for unknown in ("pooled", "posterior"):
        model = normswap.convert(plain, method, contexts=data.domain_names, unknown=unknown).eval()
        layer = model[1]
        moments = layer.mu if method == "cn-x" else layer.running_mean
        with torch.no_grad():
            moments += torch.arange(12.0).view(3, 4)
            one_by_one = [model(a[None], context=c[None]) for a, c in zip(x, contexts, strict=True)]
            wanted[unknown] = model(x)
    for unknown, expected in wanted.items():
        normswap.set_unknown(model, unknown)
        found, labels = scores.logits(model, loader, loader.test_indices())
        torch.testing.assert_close(found, expected)
        assert torch.equal(labels, data.labels[data.test])
    found, _ = scores.logits(model, loader, loader.test_indices(), scores.own)
    torch.testing.assert_close(found, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted["pooled"], wanted["posterior"])
