"""Let a model's norms share batch statistics between processes."""

import warnings
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from normswap.errors import ConversionError, expect_module, not_converted
from normswap.lifecycle.record import find_inside
from normswap.lifecycle.training import is_ours
from normswap.util.arguments import check_flag, describe
from normswap.util.distributed import name_of_group


def convert_sync_batchnorm(
    model: nn.Module, process_group: Any = None, *, others: bool = True
) -> nn.Module:
    """Let every norm of a converted model share its batch statistics between processes, in place.

    In training, CN, ACN and SelfNorm then normalise with the statistics of the batches of all
    processes together, with one all-reduce of counts and sums a layer, and another of gradients.
    Batches may differ in size, be empty, and lack contexts; every process has to run as many
    training forwards and backwards. Running statistics are then equal on all processes. CN-X
    shares the batch it starts from; it has no batch statistics. On one process nothing changes.

    Args:
        model: a converted model, before DistributedDataParallel wraps it; or convert a model whose
            norms are SyncBatchNorm already.
        process_group: of `torch.distributed`; all processes by default.
        others: whether batch norms that were not replaced become SyncBatchNorm, by torch's
            function, or by timm's where timm made them. SyncBatchNorm works on accelerators only.

    Returns:
        The model itself.

    Raises:
        ConversionError: no converted model, or one that is wrapped already.
    """
    expect_module(model)
    check_flag("others", others)
    _check_group(process_group)
    layers = [m for m in model.modules() if is_ours(m)]
    if not layers and find_inside(model) is None:
        instead = ", or torch.nn.SyncBatchNorm.convert_sync_batchnorm for plain batch norms"
        raise not_converted(model, instead)
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ConversionError(
            "expected convert_sync_batchnorm before DistributedDataParallel wraps the model"
        )
    name = name_of_group(process_group)
    for layer in layers:
        if hasattr(layer, "synced"):
            layer.synced, layer.process_group = True, name  # type: ignore[assignment]
    shared: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()) if others else ():
        for child, norm in module._modules.items():
            if norm is not None and _moves_by_itself(norm):
                if norm not in shared:
                    shared[norm] = _synchronised(norm, process_group)
                setattr(module, child, shared[norm])
    return model


def _check_group(group: Any) -> None:
    if group is not None and not hasattr(group, "group_name"):
        # What a process that is not in a group has in its place is no group, and has no name.
        member = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None
        if group is not member:
            raise ConversionError(
                "expected process_group= as torch.distributed.new_group returns it, got "
                f"{describe(group)}"
            )


def _moves_by_itself(norm: nn.Module) -> bool:
    """Return whether a module is a batch norm that moves its statistics by itself."""
    return (
        isinstance(norm, _BatchNorm)
        and not isinstance(norm, nn.SyncBatchNorm)
        and "train" not in vars(norm)  # held by normswap.freeze
    )


def _synchronised(norm: nn.Module, process_group: Any) -> nn.Module:
    """Return the SyncBatchNorm that stands for a batch norm."""
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    if type(norm).__module__.startswith("timm."):
        convert = import_module("timm.layers").convert_sync_batchnorm
    elif type(norm).forward is not _BatchNorm.forward:
        warnings.warn(
            f"{type(norm).__name__} overrides the forward of BatchNorm and is not synchronised",
            stacklevel=3,
        )
        return norm
    shared: nn.Module = convert(norm, process_group)
    shared.train(norm.training)
    return shared
