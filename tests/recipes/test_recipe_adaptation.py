import pytest
import torch

import normswap
from recipes import adaptation
from recipes.__main__ import main
from recipes.common import images
from recipes.common.grid import read_lines
from recipes.common.scores import HEADINGS
from recipes.common.weights import NARROW, make_backbone


def results(folder):
    return read_lines(folder / "results.jsonl")


SMALL = ["adaptation", "--smoke", "--model", "test_resnet", "--image-size", "16"]


def test_the_smoke_run_trains_and_tests_every_method(tmp_path, capsys):
    assert main(["adaptation", "--smoke", "--out", str(tmp_path)]) == 0

    folder = tmp_path / "adaptation-smoke"
    found = {record["cell"]["method"]: record for record in results(folder)}
    assert list(found) == ["source-only", "bn", "cn", "cn-shared", "cn-x"]
    for method, record in found.items():
        contextual = method.startswith("cn")
        expected = {"known", "pooled", "posterior"} if contextual else {"plain"}
        assert {*expected, "source"} == set(record) & {*HEADINGS, "source"}
    assert "target 45" in capsys.readouterr().out


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    """The folder of a run of bn and cn."""
    out = tmp_path_factory.mktemp("adaptation")
    assert main([*SMALL, "--methods", "bn", "cn", "--out", str(out), "--name", "true"]) == 0
    return out / "true"


def test_labels_of_the_target_change_no_training(true, monkeypatch):
    given = [*SMALL, "--methods", "bn", "cn", "--out", str(true.parent)]
    load = images.load

    def shuffled(*args, **kwargs):
        data = load(*args, **kwargs)
        target = (data.domains == adaptation.TARGET) & data.train
        data.labels[target] = data.labels[target].flip(0)
        return data

    monkeypatch.setattr(images, "load", shuffled)
    assert main([*given, "--name", "shuffled"]) == 0
    for one, other in zip(results(true), results(true.parent / "shuffled"), strict=True):
        for record in (one, other):
            record.pop("right"), record.pop("seconds")
        assert one == other


def test_labels_of_the_target_choose_no_rate(tmp_path, monkeypatch):
    given = [*SMALL, "--tune", "--methods", "cn-x-batch"]
    load = images.load

    def shuffled(*args, **kwargs):
        data = load(*args, **kwargs)
        target = data.domains == adaptation.TARGET
        data.labels[target] = data.labels[target].flip(0)
        return data

    assert main([*given, "--out", str(tmp_path), "--name", "true"]) == 0
    monkeypatch.setattr(images, "load", shuffled)
    assert main([*given, "--out", str(tmp_path), "--name", "shuffled"]) == 0
    one, other = (results(tmp_path / name) for name in ("true", "shuffled"))
    for mine, theirs in zip(one, other, strict=True):
        assert (mine["rate"], mine["source"]) == (theirs["rate"], theirs["source"])
    *tried, chosen = one
    assert len(tried) == 3
    best = max(record["source"] for record in tried)
    assert best in [record["source"] for record in tried if record["rate"] == chosen["rate"]]


def test_images_that_test_change_no_training(true, monkeypatch):
    given = [*SMALL, "--methods", "bn", "cn", "--out", str(true.parent)]
    load = images.load

    def blackened(*args, **kwargs):
        data = load(*args, **kwargs)
        data.images[data.test] = 0
        return data

    monkeypatch.setattr(images, "load", blackened)
    assert main([*given, "--name", "black"]) == 0
    lines = (folder / "epochs.jsonl" for folder in (true, true.parent / "black"))
    assert len({path.read_text() for path in lines}) == 1


@pytest.mark.parametrize("method", ["bn", "cnsn", "acn"])
def test_a_second_forward_leaves_the_buffers_and_has_gradients(method):
    model = make_backbone(NARROW, 4)[0]
    if method != "bn":
        model = normswap.convert(model, method, verify=False)
    model.train()
    images = torch.randn(4, 3, 32, 32)
    model(images)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    found = adaptation.without_trace(model, images)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    torch.manual_seed(0)
    torch.testing.assert_close(found, model(images))


def test_a_folder_runs_from_the_named_source_to_the_target(folder, tmp_path, capsys):
    given = ["--data", str(folder), "--source", "night", "--target", "day", "--image-size", "32"]
    given += ["--model", "test_resnet", "--smoke", "--methods", "cn", "--out", str(tmp_path)]
    assert main(["adaptation", *given]) == 0
    assert "source night" in capsys.readouterr().out
