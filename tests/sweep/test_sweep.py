import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.common.errors import RecipeError
from tests.sweep.__main__ import main
from tests.sweep.store import open_sweep, read_results

ROOT = Path(__file__).parents[2]
ZOO = "tests.sweep.sweep_zoo:models"


def sweep(out: Path, *options: str) -> int:
    return main(["--source", ZOO, "--out", str(out), *options])


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
    "text-asking": ("wrong", "unlabelled: outputs differ"),
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


@pytest.mark.exhaustive
def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.sweep", "--source", ZOO, "--out", str(out)]
    command += ["--filter", "good", "no-norms", "endless", "--timeout", "600"]
    quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **quiet) as process:
        deadline = time.monotonic() + 120
        path = out / "results.jsonl"
        while not (path.exists() and path.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too: one never ends
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
        (["--source", "tests.sweep.sweep_zoo:none"], "package.module:function"),
        (["--source", "tests.sweep.sweep_zoo:twice"], "'same' twice"),
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


def test_structure_alone_plans_without_running(tmp_path):
    assert sweep(tmp_path / "out", "--structure", "--filter", "good", "raising") == 0
    found = results(tmp_path / "out")
    assert {r["status"] for r in found.values()} == {"planned"}
    assert found["raising", "cn"]["replaced"] == 2
    assert not any("numbers" in r for r in found.values())
