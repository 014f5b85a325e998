import pytest
import timm
import torch
from torch import nn

import normswap
from recipes import domains
from recipes.__main__ import main
from recipes.common.data import Loader
from recipes.common.digits import load_digits
from recipes.common.errors import RecipeError
from recipes.common.grid import read_lines
from recipes.domains import JOINT, NearestDomain, tabulated

CPU = torch.device("cpu")


def test_every_domain_is_held_out_of_every_method(tmp_path, capsys):
    methods = ["bn", "cn"]
    given = ["--smoke", "--model", "test_resnet", "--held-out", "0", "90", "--methods", *methods]
    assert main(["domains", *given, "--out", str(tmp_path)]) == 0

    folder = tmp_path / "domains-smoke"
    results = read_lines(folder / "results.jsonl")
    assert [(r["cell"]["held_out"], r["cell"]["method"]) for r in results] == [
        (held, method) for held in ("0", "90") for method in methods
    ]
    cn = next(r for r in results if r["cell"] == {"held_out": "90", "method": "cn", "seed": 0})
    assert set(cn["accuracy"]) == {"label known", "pooled", "posterior", "nearest"}
    assert "90" not in cn["accuracy"]["label known"]
    assert set(cn["accuracy"]["pooled"]) == {"90"}
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "epochs.jsonl", "results.jsonl", "results.png", "report.txt",
        "table.json",
    }  # fmt: skip
    assert "cn, posterior" in capsys.readouterr().out


def test_a_rate_is_chosen_without_the_domain_that_is_held_out(tmp_path):
    given = ["--smoke", "--model", "test_resnet", "--held-out", "0", "90", "--methods", "bn", "cn"]
    given += ["--tune", "1e-3", "4e-3"]
    assert main(["domains", *given, "--out", str(tmp_path), "--name", "run"]) == 0

    *tried, a, b, c, d = read_lines(tmp_path / "run" / "results.jsonl")
    assert [r["cell"]["lr"] for r in tried] == [1e-3, 4e-3] * 4
    for record in tried:
        (found,) = record["accuracy"].values()
        assert set(found) == {"0", "30", "60", "90"} - {record["cell"]["held_out"]}
    for final in (a, b, c, d):
        of = [r for r in tried if {**final["cell"], "lr": r["cell"]["lr"]} == r["cell"]]
        best = max(map(domains.trained_mean, of))
        assert best in [domains.trained_mean(r) for r in of if r["rate"] == final["rate"]]
    assert "rate, 1e-3" in (tmp_path / "run" / "report.txt").read_text()


def test_all_domains_train_jointly_from_a_folder(folder, tmp_path):
    given = ["--joint", "--smoke", "--data", str(folder), "--image-size", "32"]
    given += ["--methods", "bn", "cn-x", "--weights", "efficientnet-lite0"]
    assert main(["domains", *given, "--out", str(tmp_path)]) == 0

    report = (tmp_path / "domains-joint-smoke" / "report.txt").read_text()
    assert "cn-x, label known" in report
    assert "epochs to 90 %" in report


def test_figures_of_held_out_domains_come_from_the_trainings_they_were_held_out_of():
    def record(held, rate, **accuracy):
        cell = {"held_out": held, "method": "cn", "seed": 0}
        unknown = {held: accuracy.pop(held)}
        found = {"label known": accuracy, "pooled": unknown}
        return {"cell": cell, "accuracy": found, "rate": rate}

    records = [record("a", 1.0, a=10.0, b=70.0, c=90.0), record("b", 3.0, a=50.0, b=20.0, c=70.0)]
    (row,) = tabulated(records, [], reach=90)

    assert row["cell"] == {"method": "cn, pooled", "seed": 0}
    assert (row["a"], row["b"], row["mean"]) == (10.0, 20.0, 15.0)
    assert row["rate"] == 2.0
    assert row["trained"] == 70.0  # mean of (70 + 90) / 2 and (50 + 70) / 2


def test_figures_of_joint_trainings_are_by_domain_and_epoch():
    cell = {"held_out": JOINT, "method": "bn", "seed": 0}
    curve = [{"a": 60.0, "b": 80.0}, {"a": 90.0, "b": 94.0}, {"a": 91.0, "b": 93.0}]
    epochs = [{"cell": cell, "accuracy": {"": accuracy}} for accuracy in curve]
    record = {"cell": cell, "accuracy": {"": curve[-1]}, "rate": 1.0}
    (row,) = tabulated([record], epochs, reach=92)

    assert (row["a"], row["b"], row["mean"]) == (91.0, 93.0, 92.0)
    assert (row["first"], row["reached"]) == (70.0, 2)


@pytest.mark.parametrize("method", ["bn-frozen", "cn-frozen"])
def test_frozen_statistics_stay_and_are_used_in_training(method):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    images = torch.randn(6, 3, 32, 32) + 2
    wanted = model.eval()(images)
    frozen = domains.apply_method(method, model, ["a", "b", "c"]).train()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}

    given = {"context": torch.tensor([0, 1, 1, 2, 2, 2])} if method == "cn-frozen" else {}
    got = frozen(images, **given)
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert frozen.bn1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize(
    ("name", "method", "stages"),
    [
        ("resnet10t", "mixstyle", ["layer1", "layer2"]),
        ("resnet10t", "dsu", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("tf_efficientnet_lite0", "efdmix-frozen", ["blocks.1", "blocks.2"]),
    ],
)
def test_augmentations_of_style_follow_the_stages_of_their_authors(name, method, stages, prefix):
    model = timm.create_model(name)
    if prefix:  # features, without the last stage
        model = timm.create_model(name, features_only=True, out_indices=range(4))
        model = nn.ModuleDict({"backbone": model})
    model = domains.apply_method(method, model, ["a", "b"])
    rows = [row.fqn for row in normswap.summary(model).rows if row.action == "inserted"]
    assert rows == [prefix + stage for stage in stages if not prefix or stage != "layer4"]


def test_mixstyle_needs_stages():
    with pytest.raises(RecipeError, match="leave mixstyle out"):
        domains.apply_method("mixstyle", nn.Sequential(nn.Conv2d(3, 4, 1)), ["a", "b"])


def test_the_nearest_domain_is_found_from_the_image_alone():
    data = load_digits(32, seed=0, limit=400)
    images = data.images.clone()
    for domain in range(4):  # each domain its own brightness
        images[data.domains == domain] = images[data.domains == domain] // 4 + 50 * domain
    object.__setattr__(data, "images", images)
    loader = Loader(data, (0.5,) * 3, (0.5,) * 3, 64, CPU)
    model = timm.create_model("resnet10t", num_classes=10).train()
    nearest = NearestDomain(model, loader)

    for domain in range(4):
        for batch in loader.whole(loader.test_indices(domain)):
            assert (nearest(batch.images) == domain).float().mean() > 0.95
    assert model.training
    assert all(
        int(m.num_batches_tracked) == 0
        for m in model.modules()
        if hasattr(m, "num_batches_tracked")
    )
