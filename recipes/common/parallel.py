"""Several processes that train one run together, started by `torchrun -m recipes ...`.

Each takes its part of every batch, so that the batch, and with it the run, is that of one process;
the first one writes and prints. Alone, everything here does nothing.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normswap

from .errors import RecipeError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tell whether this process writes and prints."""
    return rank() == 0


def say(*lines: object, **kwargs: Any) -> None:
    if is_first():
        print(*lines, **kwargs)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, and leave them afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except (RecipeError, normswap.NormswapError) as error:
        if is_first():
            raise
        raise RecipeError(f"{error} (process {rank()})") from error
    finally:
        dist.destroy_process_group()


def part_of(count: int) -> slice:
    """Give this process's part of `count` samples; parts differ by one sample at most."""
    part = torch.arange(count).tensor_split(size())[rank()].tolist()
    return slice(part[0], part[-1] + 1) if part else slice(0, 0)


def from_first(value: Any) -> Any:
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def total(values: Tensor) -> Tensor:
    """Sum a tensor over the processes."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def share_statistics(model: nn.Module, converted: bool) -> None:
    """Share batch statistics; on a CPU, where SyncBatchNorm does not work, batch norms do not."""
    if size() == 1:
        return
    on_gpu = next(model.parameters()).is_cuda
    if converted:
        normswap.convert_sync_batchnorm(model, others=on_gpu)
    elif on_gpu:
        timm.layers.convert_sync_batchnorm(model)


def wrapped(model: nn.Module) -> nn.Module:
    """Give what averages the gradients of all processes; the model itself on one."""
    # Buffers are equal already, or made so by `agree_on_buffers`; a step may run several forwards,
    # between which DistributedDataParallel's own broadcast would spoil what backward needs.
    if size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    # torch renamed the argument after 2.9.
    flag: Any = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{flag: False})


def agree_on_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first: those of norms that are not shared differ."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
