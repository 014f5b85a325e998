"""Samples without a label: what they get, chosen anew, or the surest context's answer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.graph.scope.use_context import scopes_of, use_context
from normswap.lifecycle.record import Record, find_root, method_layers, policy_of
from normswap.methods.layer import ContextLayer
from normswap.methods.registry import get_method
from normswap.util.arguments import check_callable, describe


def _find_labelled(model: nn.Module) -> tuple[nn.Module, Record]:
    root, record = find_root(model)
    if not get_method(record.method).needs_context:
        raise ConversionError(
            f"expected a model converted with a method that takes contexts, got {record.method!r}, "
            "for which no label is ever unknown"
        )
    return root, record


def set_unknown(model: nn.Module, unknown: str) -> None:
    """Choose anew what a sample without a label gets in eval, in place.

    "pooled" and "posterior" look at all contexts, also at those that `add_context` kept out.
    The choice is part of the model: copies, pickles and `save` keep it, a state dict does not. No
    parameter or statistic changes, so that policies can be compared after one training.

    Args:
        model: a converted model whose method takes contexts, perhaps compiled or in DDP.
        unknown: "pooled", "posterior", "error" or the name of a context, as for `convert`.

    Raises:
        ConversionError: not a converted model, or a method without contexts.
        UnknownNameError: `unknown` is neither a policy nor a context.
    """
    root, record = _find_labelled(model)
    policy = policy_of(unknown, record.contexts.names)
    for layer in method_layers(root).values():
        if isinstance(layer, ContextLayer):
            layer.unknown, layer.answering = policy, None
    for scope in scopes_of(root):
        scope.watch.quiet = True
    record.contexts = replace(record.contexts, unknown=policy, answering=None)


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
    _, record = _find_labelled(model)
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
