import pytest
import timm
import torch

from recipes import corruptions
from recipes.__main__ import main
from recipes.common import images, losses, methods
from recipes.common.augment import AugMix
from recipes.common.corrupt import FAMILIES, GROUPS, SEVERITIES, corrupt
from recipes.common.digits import load_digits
from recipes.common.grid import read_lines
from recipes.common.options import Parser


def run(tmp_path, *given, name="run"):
    given = ["--model", "test_resnet", *given]
    return main(["corruptions", "--out", str(tmp_path), "--name", name, *given])


def results(tmp_path, name="run"):
    return read_lines(tmp_path / name / "results.jsonl")


def test_the_smoke_setting_runs_every_method_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corruptions, "SEVERITIES", (1, 5))
    assert run(tmp_path, "--smoke", "--image-size", "16") == 0

    found = results(tmp_path)
    assert [r["cell"]["method"] for r in found] == list(corruptions.METHODS)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "epochs.jsonl", "results.jsonl", "results.png", "report.txt", "table.json",
    }  # fmt: skip
    for r in found:
        each = r["by_severity"]
        assert r["corrupted"] == pytest.approx(sum(sum(v) / 2 for v in each.values()) / len(each))
    assert "mCE, bn = 100" in capsys.readouterr().out


def test_a_training_is_the_same_again_and_more_methods_may_join_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "SEVERITIES", (2,))
    smoke = ("--smoke", "--image-size", "16", "--methods")
    assert run(tmp_path, *smoke, "cnsn+augmix+jsd", name="one") == 0
    assert run(tmp_path, *smoke, "bn", name="two") == 0
    assert run(tmp_path, *smoke, "cnsn+augmix+jsd", "bn", "--resume", name="two") == 0

    one, two = results(tmp_path, "one")[0], results(tmp_path, "two")[1]
    del one["seconds"], two["seconds"]
    assert one == two


def test_every_norm_goes_with_every_loss_that_its_layers_allow():
    known = corruptions.known()
    assert set(corruptions.METHODS) < set(known)
    assert len(set(known)) == len(known)
    for norm in corruptions.NORMS:
        model = methods.convert(timm.create_model("test_resnet"), norm, None, verify=False)
        allowed = {loss for loss in losses.LOSSES if losses.loss_of(model, loss) == loss}
        own = {name.partition("+")[2] or "ce" for name in known if name.split("+")[0] == norm}
        assert own == allowed >= {"ce", "augmix"}


def test_errors_are_counts_of_wrong_answers():
    """A model that says 3 to all is wrong wherever the digit is not 3, corrupted or not."""
    data = load_digits(32, seed=0, limit=100, angles=(0,))
    loader = images.Loader(data, (0.5,) * 3, (0.5,) * 3, 8, torch.device("cpu"))
    clean = data.images[data.test]
    corrupted = {f: {s: corrupt(clean, f, s, 0) for s in SEVERITIES} for f in FAMILIES}

    class Three(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[[3] * len(x)]

    found = corruptions.errors(Three(), loader, corrupted)
    wrong = 100 * (data.labels[data.test] != 3).double().mean().item()
    for key in ("clean", "corrupted", *GROUPS, *FAMILIES):
        assert found[key] == pytest.approx(wrong)


def test_mce_is_the_mean_of_ratios_to_bn_of_the_same_seed():
    def record(method, seed, first, others):
        errors = {name: others for name in FAMILIES} | {FAMILIES[0]: first}
        return {"cell": {"method": method, "seed": seed}, **errors}

    given = [
        record("bn", 0, 10.0, 20.0), record("cnsn", 0, 5.0, 30.0),
        record("bn", 1, 0.0, 50.0), record("cnsn", 1, 5.0, 25.0),
    ]  # fmt: skip
    found, notes = corruptions.relative(given)

    count = len(FAMILIES)
    assert [r["mce"] for r in found] == [
        pytest.approx(v) for v in (100, (50 + 150 * (count - 1)) / count, 100, 50)
    ]
    assert notes == [f"seed 1: bn makes no error in {FAMILIES[0]}, left out of mCE"]


def test_mce_needs_bn():
    record = {"cell": {"method": "cnsn", "seed": 0}, **dict.fromkeys(FAMILIES, 1.0)}
    assert corruptions.relative([record])[0][0]["mce"] is None


def test_augmix_leaves_out_operations_that_the_test_is_made_of():
    left = {op.name for op in AugMix((0.5,) * 3, corruptions.OVERLAP)._transform.ops}
    assert left == {op.name for op in AugMix((0.5,) * 3)._transform.ops} - set(corruptions.OVERLAP)
    assert not any("Contrast" in name and name != "AutoContrast" for name in left)


def test_an_unknown_operation_of_augmix_is_an_error():
    with pytest.raises(ValueError, match="expected operations of AutoContrast"):
        AugMix((0.5,) * 3, ("Fog",))


def test_few_training_images_leave_the_test_as_it_was():
    loaded = []
    for given in ([], ["--train-per-class", "7"]):
        parser = Parser("corruptions", "")
        corruptions.add_options(parser)
        options = parser.parse_args(given)
        images.settle(options)
        loaded.append(images.load_mixed(options, seed=3))
    every, few = loaded

    assert torch.equal(few.test, every.test)
    assert few.labels[few.train].bincount().tolist() == [7] * 10
    assert not (few.train & few.test).any()
