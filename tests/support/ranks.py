"""Run functions on two processes that talk to each other, and collect what they return."""

import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from normswap.errors import AdviceWarning


def on_two_processes(
    jobs: dict[str, Callable[[int], Any]], folder: Path, backend: str = "gloo"
) -> list[dict[str, Any]]:
    """Call each function with 0 and 1, on a process each; give the results by process and name.

    Args:
        jobs: functions of a module, in the order both processes run them.
        folder: empty; for the processes' store and results.
        backend: of their group; with "nccl" each has a GPU of its own.
    """
    # A process forked from one that imported torch starts at once; CUDA needs a new one.
    method = "spawn" if backend == "nccl" else "forkserver"
    torch.multiprocessing.start_processes(
        _work, (jobs, folder, backend), nprocs=2, start_method=method
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _work(rank: int, jobs: dict[str, Callable[[int], Any]], folder: Path, backend: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        warnings.simplefilter("error")
        # Models of tests are untrained.
        warnings.simplefilter("ignore", AdviceWarning)
        # The compiler of torch 2.9 meets a warning of its own.
        warnings.filterwarnings("ignore", ".*autograd.function.Function'> should not be inst")
        torch.set_num_threads(1)
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save({name: job(rank) for name, job in jobs.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()
