"""Loading by a repository's name, from a cache of the hub that a test wrote; no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normswap
from tests.support.models import make_inputs
from tests.support.saved import make

ROOT = Path(normswap.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/their-norms"
BELOW = "run/norms"


def cache(folder, repository):
    """Return where a repository's files lie in a cache of the hub."""
    stored = folder / f"models--{repository.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    return stored / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A folder, and what is said in it with a cache of the hub and without network."""
    pytest.importorskip("huggingface_hub")
    folder = tmp_path_factory.mktemp("hub")
    base, model = make()
    stored = cache(folder / "cache", NAME)
    normswap.save(model, stored)
    normswap.save(normswap.convert(base, "cn", contexts=["low", "high"]), stored / BELOW)
    torch.save((base, make_inputs(base)), folder / "base.pt")
    torch.save(model.eval()(make_inputs(base), context="b"), folder / "expected.pt")
    code = f"""
import os, normswap, torch
from normswap.cli import main
base, x = torch.load("base.pt", weights_only=False)
def pinned():
    print(normswap.summary(normswap.load(base, "{NAME}", revision="{COMMIT}")).contexts)
    try:
        normswap.load(base, "{NAME}", revision="v2")
    except normswap.CheckpointError as error:
        print(error)
pinned()
torch.save(normswap.load(base, "{NAME}").eval()(x, context="b"), "output.pt")
main(["show", "{NAME}"])
main(["show", "{NAME}", "--subfolder", "{BELOW}"])
print(normswap.summary(normswap.load(base, "{NAME}", subfolder="{BELOW}")).contexts)
main(["show", "{NAME}-of-others"])
os.makedirs("{NAME}")
pinned()
"""
    place = {"HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **place, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, said


def test_a_repository_in_the_cache_loads_as_a_folder_does(loaded):
    output, expected = (torch.load(loaded[0] / f"{name}.pt") for name in ("output", "expected"))
    torch.testing.assert_close(output, expected)


def test_the_command_line_shows_a_repository(loaded):
    assert "contexts        3: a, b, c" in loaded[1].stdout


def test_a_conversion_in_a_subfolder_of_a_repository_loads(loaded):
    assert "contexts        2: low, high" in loaded[1].stdout
    assert "('low', 'high')" in loaded[1].stdout.splitlines()


def test_a_conversion_in_a_subfolder_of_a_folder_loads(tmp_path):
    base, model = make()
    normswap.save(model, tmp_path / BELOW)
    found = normswap.load(base, tmp_path, subfolder=BELOW)
    assert normswap.summary(found).contexts == ("a", "b", "c")
    with pytest.raises(normswap.CheckpointError, match=r"run/other"):
        normswap.load(base, tmp_path, subfolder="run/other")


@pytest.mark.parametrize("subfolder", ["", "/norms", "../norms", "run/../../norms", 3, ["norms"]])
def test_a_subfolder_that_leads_elsewhere_is_refused(tmp_path, subfolder):
    with pytest.raises(normswap.CheckpointError, match="expected subfolder= as a path below"):
        normswap.load(make()[0], tmp_path, subfolder=subfolder)


def test_a_repository_that_is_not_there_is_an_error_that_says_both(loaded):
    said, other = loaded[1].stderr, f"{NAME}-of-others"
    assert f"found no folder {other}, and the hub gives no repository {other} so: " in said
    assert said.count("\n") == 1


def test_a_folder_here_wins(tmp_path, monkeypatch):
    base, model = make()
    normswap.save(model, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert normswap.summary(normswap.load(base, NAME)).contexts == ("a", "b", "c")


@pytest.mark.parametrize("folder", ["norms", "./runs/norms", "runs/norms/last", "/runs/norms"])
def test_other_paths_are_never_looked_up(tmp_path, monkeypatch, folder):
    base, _ = make()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(normswap.CheckpointError, match="found no folder"):
        normswap.load(base, folder)


def test_a_name_beside_a_folder_here_is_not_looked_up(tmp_path, monkeypatch):
    base, _ = make()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(normswap.CheckpointError, match=r"no folder norm in runs, .*revision="):
        normswap.load(base, "runs/norm")


@pytest.mark.parametrize("here", [False, True], ids=["alone", "beside a folder"])
def test_a_revision_pins_the_repository(loaded, here):
    lines = loaded[1].stdout.splitlines()
    contexts, said = lines[-2:] if here else lines[:2]
    assert contexts == "('a', 'b', 'c')"
    assert "the hub gives no repository" in said


@pytest.mark.parametrize(("folder", "revision"), [("norms", "main"), (NAME, ""), (NAME, 3)])
def test_a_revision_of_no_repository_is_refused(folder, revision):
    with pytest.raises(normswap.CheckpointError, match="expected revision="):
        normswap.load(make()[0], folder, revision=revision)


def test_without_the_library_the_error_names_the_extra(tmp_path, monkeypatch):
    base, _ = make()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(normswap.NormswapError, match=r"pip install 'normswap\[hub\]'"):
        normswap.load(base, NAME)
