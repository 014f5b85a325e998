"""What a converted model does with samples without a label, chosen anew: `set_unknown`."""

from dataclasses import replace

from torch import nn

from normswap.errors import ConversionError
from normswap.graph.use_context import scopes_of
from normswap.lifecycle.record import find_root, method_layers, policy_of
from normswap.methods.base import get_method
from normswap.methods.layer import ContextLayer


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
    root, record = find_root(model)
    if not get_method(record.method).needs_context:
        raise ConversionError(
            f"expected a model converted with a method that takes contexts, got {record.method!r}, "
            "for which no label is ever unknown"
        )
    policy = policy_of(unknown, record.contexts.names)
    for layer in method_layers(root).values():
        if isinstance(layer, ContextLayer):
            layer.unknown, layer.answering = policy, None
    for scope in scopes_of(root):
        scope.watch.quiet = True
    record.contexts = replace(record.contexts, unknown=policy, answering=None)
