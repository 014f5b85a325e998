"""`python -m tests.gpu`, rehearsed on the CPU: what it writes, and what it makes of failures."""

import json
import sys
import time

import pytest

from tests.gpu.__main__ import main
from tests.gpu.journal import CRASHED, FAILED, HUNG, NOT_RUN, PASSED, SKIPPED, Journal
from tests.gpu.report import Report
from tests.gpu.supervise import Part, run_part

FEW = "test_another_stream or (test_checkpointing and cn-x)"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Return the folder of a run of a few tests and of the layers, and its exit code."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    given = ["--select", FEW, "--only", "tests-eager", "--processes", "2"]
    code = main(["--device", "cpu", "--out", str(out), *given])
    return out, code


def test_the_report_has_every_step_with_its_outcome(rehearsed):
    out, code = rehearsed
    steps = json.loads((out / "report.json").read_text())["parts"]["tests-eager"]
    outcomes = {step["step"].rpartition("::")[2]: step["outcome"] for step in steps}
    assert outcomes["test_checkpointing_changes_nothing[False-cn-x]"] == PASSED
    assert outcomes["test_another_stream_computes_the_same[cn]"] == SKIPPED
    assert code == 0


def test_what_the_cpu_cannot_run_is_skipped_and_says_why(rehearsed):
    text = (rehearsed[0] / "report.md").read_text()
    assert "| skipped | needs a CUDA device |" in text
    assert "2 passed, 9 skipped" in text


def test_times_are_a_table_of_ratios(tmp_path):
    out = tmp_path / "run"
    assert main(["--device", "cpu", "--out", str(out), "--only", "layers-all"]) == 0
    steps = json.loads((out / "report.json").read_text())["parts"]["layers-all"]
    timed = steps[0]["result"]["ms"]
    assert {"BatchNorm2d", "cn K=4", "cn-x K=4", "selfnorm", "crossnorm"} <= timed.keys()
    assert all(t["low"] <= t["median"] <= t["high"] for t in timed.values())
    assert steps[-1]["why"] == "CUDA graphs need a CUDA device"
    assert "|  | BatchNorm2d | cn K=4 |" in (out / "report.md").read_text()


WORKER = """
import os, sys, time
from pathlib import Path
from tests.gpu.journal import PASSED, Journal
journal = Journal(Path(sys.argv[2]))
names = ["good", "killed", "endless", "last"]
journal.plan(names)
for name in names:
    if name not in journal.ended():
        journal.start(name)
        if name == "killed":
            print("a kernel went wrong", flush=True)
            os._exit(3)
        time.sleep(60 if name == "endless" else 0)
        journal.end(name, PASSED)
"""


def outcomes_of(tmp_path, code, seconds=60.0, patience=5.0):
    """Return how the steps of a worker ended, and the report's text."""
    part = Part("part", [sys.executable, "-c", code], 1.0, patience)
    report = Report(tmp_path, {})
    journal = Journal(tmp_path / "part.jsonl")
    report.parts["part"] = [journal]
    run_part(part, journal, time.monotonic() + seconds, report.write)
    report.write()
    found = {step["step"]: step["outcome"] for step in journal.steps()}
    return found, (tmp_path / "report.md").read_text()


def test_a_process_that_ends_or_hangs_costs_its_step_alone(tmp_path):
    found, text = outcomes_of(tmp_path, WORKER, patience=2.0)
    assert found == {"good": PASSED, "killed": CRASHED, "endless": HUNG, "last": PASSED}
    assert "| killed | crashed | exit code 3: a kernel went wrong |" in text
    assert "| endless | hung | no end after 2 s |" in text


def test_what_there_was_no_time_for_is_said(tmp_path):
    found, text = outcomes_of(tmp_path, WORKER.replace("os._exit(3)", "pass"), seconds=3.0)
    assert found["good"] == PASSED
    assert found["last"] == NOT_RUN
    assert "| 1 steps | not run | the time was up |" in text


def test_a_part_that_does_not_start_is_a_failure_of_its_own(tmp_path):
    found, text = outcomes_of(tmp_path, "import no_such_module")
    assert found == {"part: to start": CRASHED}
    assert "No module named 'no_such_module'" in text


def test_a_case_that_fails_leaves_the_others_their_times(tmp_path):
    report = Report(tmp_path, {})
    journal = Journal(tmp_path / "layers.jsonl")
    report.parts["layers"] = [journal]
    times = {"median": 2.0, "low": 1.0, "high": 3.0}
    bad = {"why": "RuntimeError: out of memory", "text": "Traceback"}
    result = {"ms": {"base": times, "good": {**times, "median": 3.0}, "bad": bad}}
    journal.plan(["step"])
    journal.end("step", PASSED, result=result)
    report.write()
    text = (tmp_path / "report.md").read_text()
    assert "| step: ms | 2 (1-3) | 1.50 (0.50-1.50) | FAILED |" in text
    assert f"| step: ms: bad | {FAILED} | RuntimeError: out of memory |" in text
    assert report.has_failed()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--out", "."], "expected a new folder"),
        (["--device", "cpu"], "--out"),
        (["--out", "new", "--processes", "0"], "expected --processes of 1 or more, got 0"),
        (["--device", "cpu", "--out", "new", "--only", "all"], "expected --only of tests, layers"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
