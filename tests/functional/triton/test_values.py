"""The kernels against float64 loops, in a process of their own: Triton reads its settings once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run_cases(interpret, marks="not exhaustive"):
    cases = sorted(Path(__file__).parent.glob("cases*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-m", marks, *map(str, cases)],
        env=os.environ | {"TRITON_INTERPRET": interpret, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_values_gradients_and_running_statistics():
    run_cases("1")


@pytest.mark.exhaustive
def test_further_cases():
    run_cases("1", "exhaustive")


@pytest.mark.gpu
def test_them_on_a_gpu():
    run_cases("0", "")
