"""A run on two processes is the run on one."""

import io
import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from recipes import finetune
from recipes.__main__ import main
from recipes.common import parallel
from recipes.common.data import Loader
from recipes.common.errors import RecipeError
from recipes.common.grid import read_lines
from tests.recipes.test_recipe_data import loader, numbered, numbers_of
from tests.support.sampling import sampled

ROOT = Path(__file__).parents[2]
# A batch of 45 is shared unevenly; 280 test images are 5 batches or fewer for each domain.
OPTIONS = ["--smoke", "--model", "test_resnet", "--image-size", "16", "--batch-size", "45"]
OPTIONS += ["--method", "cn", "--no-baseline"]


def as_process(monkeypatch, rank, size):
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "size", lambda: size)


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "recipes", "finetune", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
    return result.stdout


def forked(*options):
    """Start two processes with what torchrun tells them; they are forked, with all imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("forkserver")
    said = context.SimpleQueue()
    processes = [
        context.Process(target=run_one, args=(rank, told, options, said)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    return said.get() + said.get()


def run_one(rank, told, options, said):
    os.environ |= {**told, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()) as out:
        code = main(["finetune", *options])
    said.put(out.getvalue())
    sys.exit(code)


def metrics(run):
    return read_lines(run / "metrics.jsonl")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("start", sampled([forked, torchrun], 1))
def test_two_processes_finish_what_one_began_as_one_does(tmp_path, monkeypatch, capsys, start):
    out = ["--out", str(tmp_path)]
    assert main(["finetune", *OPTIONS, *out, "--name", "one"]) == 0

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "epoch_line", stop)
        assert main(["finetune", *OPTIONS, *out, "--name", "two"]) == 130
    assert len(metrics(tmp_path / "two")) == 1
    capsys.readouterr()

    printed = start(*out, "--name", "two", "--resume")
    assert printed.count("is complete") == 1
    assert "shared by 2 processes" in printed
    one, two = (metrics(tmp_path / name)[-1]["arms"]["cn"] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    for kind, accuracy in one["accuracy"].items():
        # Of 70 images a domain, rounding may move one across the boundary.
        assert two["accuracy"][kind] == pytest.approx(accuracy, abs=100 / 70 + 1e-6)
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_a_batch_as_one_process_draws_it(monkeypatch, size):
    whole = list(loader(numbered(30)).train_epoch(seed=0, epoch=0))
    parts = []
    for rank in range(size):
        as_process(monkeypatch, rank, size)
        parts.append(list(loader(numbered(30)).train_epoch(seed=0, epoch=0)))
    for index, batch in enumerate(whole):
        own = [part[index] for part in parts]
        assert torch.equal(torch.cat([b.images for b in own]), batch.images)
        assert torch.equal(torch.cat([b.context for b in own]), batch.context)
        assert max(len(b.images) for b in own) - min(len(b.images) for b in own) <= 1


def test_every_test_image_is_seen_by_one_process(monkeypatch):
    numbers = torch.arange(250)
    data = replace(numbered(250), train=numbers < 3, test=numbers > 2)
    monkeypatch.setattr("recipes.common.data.TEST_BATCH", 16)
    seen = []
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        own = loader(data, batch_size=3)
        seen += numbers_of(own.whole(own.test_indices(0)))
    assert sorted(seen) == [n for n in range(3, 250) if n % 3 == 0]


def test_fewer_images_than_processes_are_refused(monkeypatch):
    as_process(monkeypatch, 0, 8)
    with pytest.raises(RecipeError, match="of at least 8, one a process, got 4"):
        loader(numbered(30), batch_size=4)


def test_one_gpu_for_several_processes_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*OPTIONS, "--out", str(tmp_path), "--device", "cuda:0"]
    assert main(["finetune", *options]) == 2
    assert "expected --device auto, cpu or cuda with several processes" in capsys.readouterr().err


def test_alone_there_is_nothing_to_share():
    assert parallel.part_of(7) == slice(0, 7)
    assert parallel.from_first("x") == "x"
    assert isinstance(loader(numbered(30)), Loader)
    model = torch.nn.BatchNorm2d(3)
    assert parallel.wrapped(model) is model
