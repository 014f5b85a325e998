"""What pip installs is whole, and works where nothing is but what it requires."""

import os
import shutil
import subprocess
import sys

import pytest

import normswap
from tests.support.documents import ROOT

ABSENT = ["numpy", "safetensors", "sklearn", "matplotlib", "timm"]
PROGRAM = """
import runpy, sys, warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import normswap
script, folder = sys.argv[1:]
assert normswap.__file__.startswith(folder), normswap.__file__
ours = [w for w in caught if "normswap" in w.filename + w.category.__module__]
assert not ours, [str(w.message) for w in ours]
import torch

base = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
model = normswap.convert(base, "cn", contexts=["photo", "sketch"])
x = torch.randn(2, 3, 4, 4)
torch.testing.assert_close(model(x, context=["photo", "sketch"]), base(x))

sys.argv = [script, "--version"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install what a copy of the tree builds into a folder, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    left = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "normswap", folder / "normswap", ignore=left)
    quick = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--quiet"]
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *quick]
    subprocess.run([*run, "--target", folder / "installed", folder], check=True)
    return folder / "installed"


def test_it_converts_a_model_and_has_its_command_with_no_extra(installed, tmp_path):
    for name in ABSENT:
        missing = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (tmp_path / f"{name}.py").write_text(missing)
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{installed}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, installed / "bin" / "normswap", installed]
    how = {"env": os.environ | path, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"normswap {normswap.__version__}\n"


def test_files_beside_the_code_are_in_it(installed):
    (licence,) = installed.glob("normswap-*.dist-info/licenses/**/LICENSE")
    assert licence.read_bytes() == (ROOT / "normswap/LICENSE").read_bytes()
    assert (installed / "normswap/py.typed").exists()
