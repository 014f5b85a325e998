"""A prediction without a label: that of the context in which the model is surest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.graph.use_context import use_context
from normswap.lifecycle.record import find_root
from normswap.methods.base import get_method
from normswap.util.arguments import check_callable, describe


@torch.no_grad()
def most_confident(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits without a label: each sample's from the context that is surest of it.

    One forward for each context, in the mode the model is in (call ``model.eval()`` before). Of a
    sample those logits are taken whose largest softmax probability, averaged over positions, is
    the largest; of equal ones the first context's. A context that is sure of what it never saw wins
    everywhere, as where sensors differ much: compare with ``unknown="posterior"``, which takes one
    forward.

    Args:
        model: a converted model whose method takes contexts, perhaps compiled or in DDP.
        batch: what its forward takes, or what `forward` expects.
        forward: ``forward(model, batch)`` returns logits; ``model(batch)`` by default.

    Shape:
        logits: (N, classes, *); the index of the context taken: int64 (N,).

    Raises:
        ConversionError: not a converted model, a method without contexts, or no such logits.
    """
    _, record = find_root(model)
    if not get_method(record.method).needs_context:
        raise ConversionError(
            f"expected a model converted with a method that takes contexts, got {record.method!r}"
        )
    check_callable("forward", forward, "forward(model, batch)", 2)
    found = []
    for name in record.contexts.names:
        with use_context(model, name):
            logits = model(batch) if forward is None else forward(model, batch)
        if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
            raise ConversionError(
                f"expected the model to return logits (N, classes, *), got {describe(logits)}; "
                "give forward= that returns them"
            )
        found.append(logits)
    every = torch.stack(found)
    sure = every.float().softmax(2).amax(2)
    chosen = sure.reshape(*sure.shape[:2], -1).mean(2).argmax(0)
    return every[chosen, torch.arange(len(chosen), device=chosen.device)], chosen
