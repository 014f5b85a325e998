import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.__main__ import main
from recipes.errors import RecipeError
from recipes.sweep.build import build_filled, trim_repeats
from recipes.sweep.outputs import Incomparable, apart, joined, leaves
from recipes.sweep.report import share
from recipes.sweep.smallest import smallest_members
from recipes.sweep.store import open_sweep, read_results

ROOT = Path(__file__).parents[2]
ZOO = "tests.recipes.sweep_zoo:models"


def sweep(out: Path, *options: str) -> int:
    return main(["sweep", "--source", ZOO, "--out", str(out), *options])


def results(out: Path) -> dict[tuple[str, str], dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {(r["model"], r["method"]): r for r in records}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Every model of the zoo, and the exit code."""
    out = tmp_path_factory.mktemp("zoo") / "sweep"
    code = sweep(out, "--workers", "2", "--timeout", "12")
    return out, code


EXPECTED = {
    "good": ("ok", ""),
    "structured": ("ok", ""),
    "no-norms": ("no norms", ""),
    "of-batch": ("undecided", "depends on the rest of the batch"),
    "random": ("undecided", "output in eval is random"),
    "type-asking": ("wrong", "unlabelled: outputs differ"),
    "reordering": ("wrong", "training output: outputs differ"),
    "deaf": ("failed", "outputs the same for different samples"),
    "chaotic": ("failed", "rounding errors of the input alone"),
    "raising": ("failed", "no forward today"),
    "killed": ("crashed", "killed by SIGKILL"),
    "endless": ("timeout", "took more than 12 s"),
}


@pytest.mark.parametrize("model", EXPECTED)
def test_each_kind_of_model_gets_its_verdict(swept, model):
    status, why = EXPECTED[model]
    record = results(swept[0])[model, "cn"]
    assert record["status"] == status
    said = [*record.get("problems", []), *record.get("doubts", []), record.get("error", "")]
    assert any(why in text for text in said)


def test_a_sweep_with_anything_not_right_ends_with_1_and_says_what(swept):
    out, code = swept
    assert code == 1
    report = (out / "report.md").read_text()
    for model, (status, why) in EXPECTED.items():
        assert (f"- {model} (cn)" in report) == (status not in ("ok", "no norms"))
        assert why in report
    data = json.loads((out / "report.json").read_text())
    totals = data["summary"]["methods"]["cn"]
    assert (totals["architectures"], totals["ok"], totals["wrong"]) == (12, 2, 2)
    assert data["summary"]["complete"]


def test_a_right_model_is_checked_in_every_way(swept):
    record = results(swept[0])["good", "cn"]
    assert (record["found"], record["replaced"], record["threaded"]) == (2, 2, 2)
    names = {"unlabelled", "context 0", "context 1", "context 2", "one by one", "original code"}
    names |= {"training output", "training gradients", "training statistics"}
    names |= {"eval after training"}
    numbers = record["numbers"]
    assert all(numbers[name] < 1e-12 for name in names)
    assert numbers["effect"] > 0.01
    assert numbers["moved"] == 2 * 3
    assert record["convert_seconds"] > 0
    assert record["sync_seconds"] > 0


def test_every_method_runs_and_all_right_ends_with_0(tmp_path):
    methods = ["cn", "cn-x", "acn", "crossnorm", "selfnorm", "cnsn"]
    only = ("--filter", "good", "structured", "--methods", *methods)
    assert sweep(tmp_path / "out", *only) == 0
    assert {m for _, m in results(tmp_path / "out")} == set(methods)


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "recipes", "sweep", "--source", ZOO, "--out", str(out)]
    command += ["--filter", "good", "no-norms", "endless", "--timeout", "600"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        path = out / "results.jsonl"
        while not (path.exists() and path.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    before = path.read_bytes()
    path.write_bytes(before + b'{"model": "no-no')  # a line cut off by the kill
    names = ("--filter", "good", "no-norms", "endless", "--timeout", "3", "--resume")
    assert sweep(out, *names) == 1
    assert path.read_bytes().startswith(before)
    statuses = {m: r["status"] for (m, _), r in results(out).items()}
    assert statuses == {"good": "ok", "no-norms": "no norms", "endless": "timeout"}


@pytest.fixture
def finished(swept, tmp_path):
    """A copy of the finished sweep's folder."""
    return shutil.copytree(swept[0], tmp_path / "finished")


def test_a_finished_sweep_is_not_run_again(finished):
    before = (finished / "results.jsonl").read_bytes()
    assert sweep(finished, "--resume") == 1
    assert (finished / "results.jsonl").read_bytes() == before


def test_a_sweep_that_is_there_is_neither_overwritten_nor_mixed(finished, capsys):
    before = (finished / "results.jsonl").read_bytes()
    for options, message in (
        ((), "add --resume to continue it"),
        (("--resume", "--seed", "5"), "the settings of the sweep at"),
        (("--resume", "--methods", "cn-x"), "the settings of the sweep at"),
    ):
        assert sweep(finished, *options) == 2
        assert message in capsys.readouterr().err
    config = json.loads((finished / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (finished / "config.json").write_text(json.dumps(config))
    assert sweep(finished, "--resume") == 2
    assert "torch: '1.0'" in capsys.readouterr().err
    assert (finished / "results.jsonl").read_bytes() == before


def test_restart_forgets_the_results(finished):
    config = json.loads((finished / "config.json").read_text())
    assert open_sweep(finished, config["settings"], resume=False, restart=True) == {}
    assert not (finished / "results.jsonl").exists()


def test_a_damaged_line_within_the_results_is_an_error(finished):
    path = finished / "results.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first[:20], *rest]) + "\n")
    with pytest.raises(RecipeError, match="cannot read line 1 of"):
        read_results(finished)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--filter", "nothing-like-it"], "--filter and --exclude to match a model"),
        (["--exclude", "*"], "at least one model, got none"),
        (["--methods", "batchnorm"], "unknown method 'batchnorm'"),
        (["--workers", "0"], "--workers above 0"),
        (["--timeout", "-1"], "--timeout above 0"),
        (["--resume"], "found no config.json"),
        (["--resume", "--restart"], "got both"),
        (["--smallest-per-family"], "--source timm"),
        (["--smoke"], "--smoke alone"),
        (["--source", "tests.recipes.sweep_zoo:none"], "package.module:function"),
        (["--source", "tests.recipes.sweep_zoo:twice"], "'same' twice"),
        (["--source", "nowhere"], "package.module:function"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, capsys, options, message):
    assert sweep(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert sweep(tmp_path, "--restart", "--filter", "good") == 2
    assert "empty or a sweep's" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["precious.txt"]


@dataclass
class Pair:
    first: object
    second: object


def test_every_tensor_of_a_nested_output_is_found():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    found = leaves({"a": [one, (two, None)], "b": Pair(three, "text"), "c": 2.5})
    assert [t.numel() for t in found] == [1, 2, 3, 1]
    assert float(found[-1]) == 2.5
    with pytest.raises(Incomparable, match="outputs a object"):
        leaves([object()])


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1e-3, 0.0], [0.0, 0.0], float("inf")),
    ],
)
def test_differences_are_relative_to_the_largest_value(new, old, expected):
    assert apart([torch.tensor(new)], [torch.tensor(old)]) == expected


def test_integers_must_be_the_same_and_shapes_too():
    assert apart([torch.tensor([1])], [torch.tensor([2])]) == float("inf")
    with pytest.raises(Incomparable, match="shapes"):
        apart([torch.ones(2)], [torch.ones(3)])


def test_samples_are_joined_as_their_batch_has_them():
    whole = [torch.arange(6.0).view(3, 2), torch.tensor(7.0)]
    singles = [[whole[0][i : i + 1], whole[1]] for i in range(3)]
    assert all(map(torch.equal, joined(singles, whole), whole))
    boxes = [torch.ones(i + 1, 4) for i in range(3)]
    assert all(map(torch.equal, joined([[b] for b in boxes], boxes), boxes))
    with pytest.raises(Incomparable, match="a batch outputs"):
        joined(singles, [torch.ones(5, 2), torch.ones(2)])


def test_structure_alone_plans_without_running(tmp_path):
    assert sweep(tmp_path / "out", "--structure", "--filter", "good", "raising") == 0
    found = results(tmp_path / "out")
    assert {r["status"] for r in found.values()} == {"planned"}
    assert found["raising", "cn"]["replaced"] == 2
    assert not any("numbers" in r for r in found.values())


def test_torchvision_is_a_source(tmp_path):
    out = tmp_path / "out"
    names = ["lraspp_mobilenet_v3_large", "raft_small", "alexnet"]
    assert main(["sweep", "--source", "torchvision", "--out", str(out), "--filter", *names]) == 0
    found = {name: r for (name, _), r in results(out).items()}
    assert found["lraspp_mobilenet_v3_large"]["replaced"] == 47
    # Optical flow takes two images, and is written for float32.
    assert (found["raft_small"]["dtype"], found["raft_small"]["family"]) == (
        "float32",
        "optical_flow",
    )
    assert found["alexnet"]["status"] == "no norms"


def test_the_smallest_member_with_norms_stands_for_a_family():
    names = ["resnet34", "resnet18", "vit_tiny_patch16_224", "vgg11", "vgg13_bn"]
    assert smallest_members(names, 1, 60, float("inf")) == ["resnet18", "vgg13_bn"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_architecture_of_every_family_of_timm_converts_right(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--smallest-per-family", "--workers", "2", "--memory-gb", "8", "--out", str(out)]
    code = main(["sweep", *options])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert len(results(out)) >= 59


@pytest.mark.slow
def test_models_that_other_methods_got_wrong_once(tmp_path, capsys):
    names = ["dla46x_c", "ghostnet_050", "rexnet_100", "shvit_s1", "efficientvit_m0"]
    methods = ["--methods", "acn", "selfnorm", "--workers", "2", "--memory-gb", "8"]
    code = main(["sweep", "--filter", *names, *methods, "--out", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().out


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        same = [nn.Sequential(nn.Linear(80, 80), nn.ReLU()) for _ in range(5)]
        self.body = nn.Sequential(nn.Linear(3, 80), *same, nn.Linear(80, 2))

    def forward(self, x):
        return self.body(x)


def test_trimming_keeps_some_of_the_repeated_blocks():
    model = Blocks()
    assert trim_repeats(model, 2) == 3
    assert [len(list(m.parameters())) for m in model.body] == [2, 2, 2, 2]
    assert model(torch.ones(4, 3)).shape == (4, 2)


def test_filled_models_have_no_constant_and_no_unset_parameter():
    def build():
        model = Blocks()
        nn.init.zeros_(model.body[0].weight)
        model.scale = nn.Parameter(torch.full((10,), 1e-6))
        model.norm = nn.BatchNorm1d(9000)
        return model

    first, again = (build_filled(build, "name", 0, torch.float64, 0) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
        assert one.std() > 1e-3
    assert first.norm.running_var.std() > 0.1


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(5, 5, "5 of 5 (100.00 %)"), (99999, 100000, "99,999 of 100,000 (99.99 %)"), (0, 0, "0")],
)
def test_a_share_says_100_percent_only_of_all(part, whole, text):
    assert share(part, whole) == text
