"""Contexts that differ, and the original's own code run with the layers of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .build import fixed_norms


class Folded(Exception):
    """A norm whose rows are not the samples of the batch."""


@torch.no_grad()
def randomise(tensors: Sequence[tuple[str, Tensor]], owners: dict[int, nn.Module]) -> None:
    """Move the parameters and statistics of each context apart.

    Args:
        tensors: (name, tensor) of the layers.
        owners: id of a tensor -> its layer.
    """
    torch.manual_seed(7)
    for name, tensor in tensors:
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, nn.Parameter):
            size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
            tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.25))
            tensor.add_(0.05 * (size or 1.0) * torch.randn_like(tensor))
        elif leaf == "running_var":
            tensor.mul_(torch.empty_like(tensor).uniform_(0.7, 1.4))
        elif leaf == "running_mean":
            spread = getattr(owners[id(tensor)], "running_var", torch.ones_like(tensor)).sqrt()
            tensor.add_(0.2 * spread * torch.randn_like(tensor))


Pairs = list[tuple[nn.Module, nn.Module]]


def reference(pairs: Pairs, context: Any) -> Any:
    """Run the original's own code with each norm computed by its replacement, for one label.

    Args:
        pairs: (norm of the original, layer that replaced it).
        context: a name for all rows; a tuple with a label a row; None for layers without labels.
    """

    def compute(layer: nn.Module, x: Tensor) -> Tensor:
        if context is None:
            return layer(x)
        if isinstance(context, str):
            return layer(x, context=context)
        if x.shape[0] != len(context):
            raise Folded
        return layer(x, context=torch.tensor(context))

    return fixed_norms([(norm, partial(compute, layer)) for norm, layer in pairs])


def snapshot(buffers: Sequence[Tensor]) -> list[Tensor]:
    """Copy buffers."""
    return [b.clone() for b in buffers]


@torch.no_grad()
def restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put values back into buffers."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
