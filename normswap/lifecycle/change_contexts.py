"""One context more, or less, in a converted model: `add_context` and `remove_context`."""

import warnings
from dataclasses import replace
from itertools import count as count_from
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ContextWarning, ConversionError
from normswap.graph.scope.use_context import scopes_of
from normswap.lifecycle.context_rows import change_contexts, changed_tables, check_changeable
from normswap.lifecycle.record import context_index, context_or_pooled, find_root
from normswap.methods.base import Contexts
from normswap.methods.norm_values import pick
from normswap.methods.unknown_labels import POLICIES
from normswap.util.arguments import check_flag, describe, listed

# A share far smaller rounds to zero in the layers, which divide by its root.
_LEAST = 1e-6


@torch.inference_mode(False)
def add_context(
    model: nn.Module,
    name: str | None = None,
    *,
    like: str | int = "pooled",
    share: float | None = None,
    keep_unknown: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Add a context to a converted model, in place.

    In eval mode the new context computes what `like` computes. For given labels nothing else
    changes, to the bit. Answers without a label do change where the policy looks at all contexts:
    under ``unknown="pooled"`` the mixture has one more part (with ``like="pooled"`` its mean,
    variance and affine stay what they are until the new context is trained), under "posterior" one
    more candidate. A warning says so. With `keep_unknown` they are what they were, up to rounding,
    also while the new context is trained and after `save` and `load`.

    Parameters with a row a context are replaced by new ones: pass the `optimizer`, or make it
    anew, else it goes on with the old ones in silence. In its state the new row is that of `like`,
    or for "pooled" the mean over contexts. A model with one context, for which no label was
    needed, needs labels in training from now on.

    Args:
        model: a converted model whose method takes contexts; not wrapped in DDP.
        name: of the new context; by default its number, or the next that is not taken.
        like: the context to start from, by name or index, or "pooled".
        share: prior probability of the new context, 1 / (K + 1) by default, at least 1e-6 away from
            0 and 1; the others keep their ratios. The layers' buffers `priors` are appended to and
            not scaled, since CN divides by their roots; their sum is then no longer one.
        keep_unknown: whether the new context is kept out of the mixture that "pooled", "posterior"
            and ``specialize(model, "pooled")`` take, as any added later then is. `set_unknown` lets
            them look at all contexts again.
        optimizer: one that trains these parameters; torch's, timm's, or any that keeps its state
            by parameter and row.

    Returns:
        The index of the new context.

    Raises:
        ConversionError: not a converted model; a method without contexts; a name that is taken;
            an optimizer, or a hook on a parameter, that cannot follow; a flag that is no bool.
            Nothing is changed then.
        UnknownNameError, ContextError: no such context as `like`.

    Warns:
        ContextWarning: samples without a label get other answers from now on.
    """
    root, record = find_root(model)
    method, contexts = check_changeable(model, root, record, "add to"), record.contexts
    check_flag("keep_unknown", keep_unknown)
    if name is None:  # the number may be the name of one that was added before another was removed
        name = next(n for n in map(str, count_from(contexts.count)) if n not in contexts.names)
    _check_name(name, contexts)
    index = context_or_pooled(record, like)
    count = contexts.count
    share = 1 / (count + 1) if share is None else share
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not _LEAST <= share <= 1 - _LEAST:
        raise ConversionError(
            f"expected share= in (0, 1), got {describe(share)}; at least {_LEAST} from both ends"
        )
    tables = changed_tables(root, method, index, share, _append)
    weights = contexts.priors
    priors = torch.cat([weights * (1 - share), weights.new_tensor([share])])
    answering = contexts.answering or (count if keep_unknown else None)
    names = (*contexts.names, name)
    after = replace(contexts, names=names, priors=priors, answering=answering)
    change_contexts(
        root,
        record,
        after,
        tables,
        optimizer,
        of_state=lambda state: _append(state, pick(state, index, weights.to(state.device))),
        of_grad=lambda grad: _append(grad, torch.zeros_like(grad[0])),
    )
    for scope in scopes_of(root):
        scope.watch.quiet = True  # training may go on with the new context alone
    policy = contexts.unknown
    # The mixture stays the same function where all its parts are like one.
    looks = count > 1 and answering is None
    if looks and (policy == "posterior" or (policy == "pooled" and index is not None)):
        warnings.warn(
            f"samples without a label are now answered by context {name!r} too, for a share of "
            f"{share:.3g} (unknown={policy!r}); add_context(..., keep_unknown=True) keeps them as "
            "they were",
            ContextWarning,
            stacklevel=3,
        )
    return count


def _check_name(name: Any, contexts: Contexts) -> None:
    if not isinstance(name, str) or not name:
        raise ConversionError(
            f"expected the name of the new context as a string, got {describe(name)}"
        )
    if name in contexts.names:
        raise ConversionError(
            f"there is a context {name!r} already; the contexts are {', '.join(contexts.names)}"
        )
    if name in POLICIES:
        raise ConversionError(f"{name!r} is a policy for unknown labels; choose another name")


def _append(table: Tensor, row: Tensor) -> Tensor:
    return torch.cat([table, row.detach().to(table).unsqueeze(0)])


@torch.inference_mode(False)
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

    tables = changed_tables(root, method, 0, 0.5, lambda table, _: shorten(table))
    change_contexts(root, record, after, tables, optimizer, shorten, shorten)
    if moved := after.names[index:]:
        warnings.warn(
            f"without {contexts.names[index]!r}, labels that are numbers mean other contexts: "
            f"{listed(f'{name} is {index + k}' for k, name in enumerate(moved))}",
            ContextWarning,
            stacklevel=3,
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
