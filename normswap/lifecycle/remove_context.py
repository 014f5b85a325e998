"""One context less in a converted model: `remove_context`."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from normswap.errors import ContextWarning, ConversionError
from normswap.lifecycle.context_rows import change_contexts, check_changeable, table_of
from normswap.lifecycle.record import context_index, find_root, method_layers
from normswap.methods.base import Contexts
from normswap.util.arguments import listed


def remove_context(
    model: nn.Module, context: str | int, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Take a context out of a converted model, in place; what it learned is gone.

    For given labels nothing else changes, to the bit. The priors of the others keep their ratios,
    and "pooled" and "posterior" look at them alone from now on: right after `add_context` this is
    its undoing. Contexts after the removed one move down by one in number; their names stay.

    Parameters with a row a context are replaced by new ones, as by `add_context`: pass the
    `optimizer`, or make it anew.

    Args:
        model: a converted model whose method takes contexts; not wrapped in DDP.
        context: which, by name or index.
        optimizer: one that trains these parameters; as for `add_context`.

    Raises:
        ConversionError: not a converted model; a method without contexts; the only context, or
            one that samples without a label depend on; an optimizer, or a hook on a parameter,
            that cannot follow. Nothing is changed then.
        UnknownNameError, ContextError: no such context.

    Warns:
        ContextWarning: other contexts have new numbers.
    """
    root, record = find_root(model)
    method = check_changeable(model, root, record, "remove")
    contexts, index = record.contexts, context_index(record, context)
    after = _without(contexts, index)

    def shorten(table: Tensor) -> Tensor:
        return torch.cat([table[:index], table[index + 1 :]])

    # The tensors that a further context has a row of are those that each context has one of.
    tables = {
        where: {
            key: shorten(table_of(where, layer, key)) for key in method.added_rows(layer, 0, 0.5)
        }
        for where, layer in method_layers(root).items()
    }
    change_contexts(root, record, after, tables, optimizer, shorten, shorten)
    if moved := after.names[index:]:
        warnings.warn(
            f"without {contexts.names[index]!r}, labels that are numbers mean other contexts: "
            f"{listed(f'{name} is {index + k}' for k, name in enumerate(moved))}",
            ContextWarning,
            stacklevel=2,
        )


def _without(contexts: Contexts, index: int) -> Contexts:
    """Return the contexts but one, and what answers for unknown labels without it."""
    name, unknown, answering = contexts.names[index], contexts.unknown, contexts.answering
    if contexts.count == 1:
        raise ConversionError(
            f"{name!r} is the only context; normswap.specialize(model) returns the model without"
        )
    alone = index == 0 and answering == 1 and unknown in ("pooled", "posterior")
    if unknown == index or alone:
        raise ConversionError(
            f"samples without a label are answered by context {name!r} alone; choose what else "
            "they get with normswap.set_unknown first"
        )
    kept = [k for k in range(contexts.count) if k != index]
    priors = contexts.priors[kept]
    if isinstance(unknown, int):
        unknown -= unknown > index
    if answering is not None:
        answering -= index < answering
    return replace(
        contexts,
        names=tuple(contexts.names[k] for k in kept),
        priors=priors / priors.sum(),
        unknown=unknown,
        answering=answering if answering and answering < len(kept) else None,
    )
