"""Sums over the processes that train one model together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normswap.errors import ConversionError


class _Sum(torch.autograd.Function):
    """All-reduce by sum; the gradient of a sum over processes is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=find_group(group))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


def _sum(x: Tensor, group: str | None) -> Tensor:
    total: Tensor = _Sum.apply(x, group)
    return total


def find_group(name: str | None) -> Any:
    """Return the process group of a name as `sum_over` takes it, None without processes.

    It raises where this process knows no such group.
    """
    if name is None or not (dist.is_available() and dist.is_initialized()):
        return None
    registry: Any = dist.distributed_c10d
    outside = dist.GroupMember.NON_GROUP_MEMBER
    return registry._resolve_process_group(name) if name else outside


def sum_over(group: str | None = None) -> Callable[[Tensor], Tensor] | None:
    """Return a sum over the processes of a group, None where this process is alone.

    Every process of the group has to call the result equally often, with tensors of one shape,
    and to run its backward equally often.

    Args:
        group: name of a process group; "" for one that this process is not in; all processes by
            default.
    """
    if group == "" or not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size(find_group(group)) < 2:
        return None
    return partial(_sum, group=group)


def sum_over_ddp() -> Callable[[Tensor], Tensor] | None:
    """Return a sum over the processes whose buffers DistributedDataParallel keeps equal.

    None outside the forward of such a wrapper, in compiled code, which cannot tell, and in its
    ``join()``, where a process that has no more batches would be waited for in vain.
    """
    if torch.compiler.is_compiling():
        return None
    wrapped: Any = DistributedDataParallel
    wrapper: Any = wrapped._get_active_ddp_module()
    if wrapper is None or not wrapper.broadcast_buffers or wrapper._join_config.enable:
        return None
    return sum_over(wrapper.process_group.group_name)


def group_name(module: nn.Module) -> str | None:
    """Return the name of a layer's process group, as `sum_over` takes it.

    A process group can be neither copied nor pickled, its name can.
    """
    return name_of_group(getattr(module, "process_group", None))


def name_of_group(group: Any) -> str | None:
    """Return the name of a process group, None for all processes, "" where this is in none."""
    return None if group is None else str(getattr(group, "group_name", ""))


def shared_groups(model: nn.Module) -> dict[int, Any]:
    """Return the memo for `copy.deepcopy` by which a copy shares process groups."""
    groups = (getattr(module, "process_group", None) for module in model.modules())
    return {id(group): group for group in groups if group is not None}


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes share the parameters of a model out among them."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Refuse a model of whose parameters each process has a part.

    Raises:
        ConversionError: it is one.
    """
    if is_sharded(model):
        raise ConversionError(
            f"cannot {verb} a sharded model; load its weights, as get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict returns them, into the same conversion of "
            "the model, not sharded, and give that"
        )
