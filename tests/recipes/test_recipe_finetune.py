import multiprocessing
import os
import shutil
import time
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_flatten

import normswap
from normswap.methods.base import Method
from recipes import finetune
from recipes.__main__ import main
from recipes.common import images
from recipes.common.grid import read_lines
from tests.recipes.test_recipe_options import parser_of
from tests.support.sampling import sampled

QUICK = ["finetune", "--smoke", "--model", "test_resnet", "--image-size", "16"]
FILES = ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]
FILES += ["model.safetensors", "report.txt"]
METHODS = [name for name in normswap.methods() if name not in ("cn", "acn")]


def finetune_quickly(out: Path, *options: str) -> int:
    return main([*QUICK, "--out", str(out), *options])


def assert_same_checkpoint(first: Path, second: Path) -> None:
    one, other = (torch.load(run / "checkpoint.pt")["states"] for run in (first, second))
    (ours, spec), (theirs, other_spec) = tree_flatten(one), tree_flatten(other)
    assert spec == other_spec
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def options_of(*given: str) -> Namespace:
    options = parser_of(finetune.add_options).parse_args([*QUICK[1:], *given])
    finetune.settle(options)
    return options


def metrics(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def without_times(value):
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if k not in ("seconds", "step_ms", "step_ratio")
        }
    return [without_times(v) for v in value] if isinstance(value, list) else value


# One that replaces norms and takes labels, one that takes none, one that is inserted into blocks,
# and one after stages; then the others.
KINDS = ["cn", "acn", "cnsn", "dsu"]


@pytest.mark.parametrize(
    "method", sampled(sorted(normswap.methods(), key=lambda m: m not in KINDS), 4)
)
def test_smoke_run_trains_both_models_and_leaves_every_file(tmp_path, capsys, method):
    assert finetune_quickly(tmp_path, "--name", "run", "--method", method, "--epochs", "1") == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.format == "PNG"
    printed = capsys.readouterr().out
    replaces = isinstance(normswap.get_method(method), Method)
    labelled = normswap.get_method(method).needs_context
    # Augmentations of style stand after stages, not in every block.
    places = {"mixstyle": 2, "efdmix": 2, "dsu": 5}.get(method, 4)
    expected = [
        "norms: 15 found, 15 replaced" if replaces else f"places: {places} found, {places} given",
        f"{method}, label unknown" if labelled else f" {method} ",
        "step / bn",
    ]
    for text in expected:
        assert text in printed
    arms = metrics(tmp_path / "run")[-1]["arms"]
    assert set(arms) == {"bn", method}
    kind = "known" if labelled else "unknown"
    assert set(arms[method]["accuracy"][kind]) == {"0", "30", "60", "90"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, to look at."""
    out = tmp_path_factory.mktemp("finetune")
    assert finetune_quickly(out, "--name", "run") == 0
    return out / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to run again."""
    return shutil.copytree(finished, tmp_path / "run")


def test_the_saved_model_is_the_trained_converted_one(finished):
    model = timm.create_model("test_resnet", num_classes=10)
    model = normswap.convert(model, method="cn-x", contexts=["0", "30", "60", "90"])
    saved = load_file(finished / "model.safetensors")
    model.load_state_dict(saved)
    trained, _ = torch.load(finished / "checkpoint.pt")["states"]["cn-x"]
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[k], v) for k, v in saved.items())


def test_both_models_start_from_the_same_function(tmp_path):
    options = options_of()
    (bn, converted), loader = finetune.build(options, images.load(options))
    batch = next(loader.train_epoch(0, 0))
    with torch.inference_mode():
        before = bn.model.eval()(batch.images)
        after = converted.model.eval()(batch.images, context=batch.context)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert before.std() > 0


def test_a_held_out_domain_is_no_context_and_tested_unknown(tmp_path, capsys):
    assert finetune_quickly(tmp_path, "--name", "run", "--held-out", "60", "--epochs", "1") == 0
    accuracy = metrics(tmp_path / "run")[-1]["arms"]["cn-x"]["accuracy"]
    assert set(accuracy["known"]) == {"0", "30", "90"}
    assert set(accuracy["unknown"]) == {"0", "30", "60", "90"}
    assert "3 context(s): 0, 30, 90" in capsys.readouterr().out


def test_a_folder_of_images_trains(tmp_path, folder, capsys):
    assert finetune_quickly(tmp_path, "--name", "run", "--data", str(folder)) == 0
    accuracy = metrics(tmp_path / "run")[-1]["arms"]["cn-x"]["accuracy"]
    assert set(accuracy["known"]) == {"day", "night"}


def test_weights_from_a_file_are_the_start_and_a_skipped_head_is_said(tmp_path, capsys):
    source = timm.create_model("test_resnet", num_classes=3)
    save_file(source.state_dict(), tmp_path / "start.safetensors")
    options = options_of("--weights", str(tmp_path / "start.safetensors"))
    (bn, _), _ = finetune.build(options, images.load(options))
    for name, value in source.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, bn.model.state_dict()[name]), name
    assert "head fc.weight starts at zero" in capsys.readouterr().out


def test_autocast_trains(tmp_path):
    # At 16 px the last maps are one pixel, and there the gradient of a strided 3x3 convolution in
    # bfloat16 is not finite in some calls on the CPU (torch 2.14.1).
    options = ["--amp", "--image-size", "36", "--epochs", "1", "--no-baseline"]
    assert finetune_quickly(tmp_path, "--name", "run", *options) == 0


# One of each kind of state (of contexts beside the plain model's, of a schedule beside statistics,
# of components), and of each kind of loss; the first two in every run.
RESUMED = [
    (["--method", "cn"], "Training loss: bn ce, cn ce."),
    (
        ["--method", "cnsn", "--loss", "jsd"],
        "Training loss: bn ce, cnsn jsd (the rest needs CrossNorm).",
    ),
    (["--method", "acn", "--no-baseline"], "Training loss: acn ce."),
    (
        ["--method", "crossnorm", "--loss", "augmix+jsd", "--image-size", "16"],
        "Training loss: bn augmix, crossnorm augmix+jsd (the rest needs CrossNorm).",
    ),
]
OTHERS = [(["--method", m, "--no-baseline"], f"Training loss: {m} ce.") for m in METHODS]


@pytest.mark.parametrize(("options", "line"), sampled([*RESUMED, *OTHERS], 2))
def test_resuming_after_an_interrupt_equals_an_uninterrupted_run(
    tmp_path, monkeypatch, options, line
):
    assert finetune_quickly(tmp_path, "--name", "whole", *options) == 0
    assert line in (tmp_path / "whole" / "report.txt").read_text(encoding="utf-8")
    arms = {options[1]} if "--no-baseline" in options else {"bn", options[1]}
    assert set(metrics(tmp_path / "whole")[-1]["arms"]) == arms
    train_and_test = finetune.train_and_test

    def interrupted(arms, loader, config, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_and_test(arms, loader, config, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_and_test", interrupted)
        assert finetune_quickly(tmp_path, "--name", "parts", *options) == 130
    assert [record["epoch"] for record in metrics(tmp_path / "parts")] == [1]
    assert main(["finetune", "--out", str(tmp_path), "--name", "parts", "--resume"]) == 0
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (without_times(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts


def test_the_baseline_beside_jsd_is_that_of_cross_entropy(tmp_path, capsys):
    given = ["--epochs", "1", "--method", "crossnorm"]
    for loss in ("ce", "jsd"):
        assert finetune_quickly(tmp_path, "--name", loss, "--loss", loss, *given) == 0
    states = [torch.load(tmp_path / loss / "checkpoint.pt")["states"] for loss in ("ce", "jsd")]
    for arm, expected in (("bn", True), ("crossnorm", False)):
        ce, jsd = (found[arm][0] for found in states)
        assert all(torch.equal(value, jsd[name]) for name, value in ce.items()) == expected
    # Another loss does not go on with it.
    assert finetune_quickly(tmp_path, "--name", "jsd", "--resume", "--loss", "ce") == 2
    assert "expected --loss to be 'jsd', as in the run" in capsys.readouterr().err


def run_on_one_thread(options):
    torch.set_num_threads(1)  # as the runs it is compared with
    main(options)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_resuming_after_kill_9_equals_an_uninterrupted_run(tmp_path):
    options = [*QUICK, "--out", str(tmp_path), "--epochs", "4", "--no-baseline"]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_on_one_thread, args=([*options, "--name", "killed"],))
    process.start()
    written = tmp_path / "killed" / "metrics.jsonl"
    while not (written.exists() and written.read_text()):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 1 <= len(metrics(tmp_path / "killed")) < 4
    assert main(["finetune", "--out", str(tmp_path), "--name", "killed", "--resume"]) == 0
    assert main([*options, "--name", "whole"]) == 0
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_resumes_to_its_report(copied):
    (copied / "report.txt").unlink()
    before = metrics(copied)
    assert main(["finetune", "--out", str(copied.parent), "--name", "run", "--resume"]) == 0
    assert metrics(copied) == before
    assert (copied / "report.txt").exists()


def test_an_existing_run_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert finetune_quickly(tmp_path, "--name", "run") == 2
    assert "add --resume to continue it" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_resuming_with_another_setting_leaves_the_run_as_it_is(copied, capsys):
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    assert finetune_quickly(copied.parent, "--name", "run", "--resume", "--seed", "1") == 2
    assert "expected --seed to be 0" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_an_unknown_command_is_refused_with_the_choices(capsys):
    assert main(["fine-tune"]) == 2
    assert "unknown command 'fine-tune'; choose from finetune" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    assert "finetune" in capsys.readouterr().out
