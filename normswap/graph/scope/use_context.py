"""Give labels to forwards that are passed none, for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from normswap.errors import ContextError, expect_module, not_converted
from normswap.functional.labels import Labels
from normswap.graph.scope.scope import Scope, scope_of
from normswap.util.original_class import STATE


def scopes_of(model: nn.Module) -> list[Scope]:
    """Return the scopes in the converted models that are, or are inside, a module.

    None where no norm takes labels. A container has another than its norms where a copy of the part
    that holds these took its place. A model that was converted by itself before it became part of
    another has labels of its own.
    """
    found: dict[int, Scope] = {}
    labelled = False
    queue: list[tuple[nn.Module, Scope | None]] = [(model, None)]
    while queue:
        module, within = queue.pop()
        scope = scope_of(module)
        if scope is not None:
            if within is not None and within is not scope.model:
                continue
            within = scope.model
            labelled |= STATE not in vars(module)
            found[id(scope)] = scope
        queue += [(child, within) for child in module.children()]
    return list(found.values()) if labelled else []


@contextmanager
def use_context(model: nn.Module, context: Labels | None) -> Iterator[None]:
    """Give every forward inside the block these labels, where it is passed none.

    For loops that cannot pass ``context=`` themselves. The model may be wrapped (compiled,
    distributed). Blocks nest; None hides the labels of an outer block. A block belongs to its
    thread and its asyncio task: work handed to another thread takes it along by
    ``contextvars.copy_context().run``. A generator has none of its own: where two take turns, as
    loaders that are zipped, each with a block, forwards have the labels of the later block, and the
    other's end is an error. A loop that fetches a batch ahead from one, as Lightning does where a
    loader has no length, runs each with the labels of the next; one that is kept unfinished keeps
    its block open: ``close()`` it before code that has no labels. A copy of the model, as an EMA
    model, has blocks of its own: for both, give ``torch.nn.ModuleList([model, ema])``. Labels are
    in the order of what the converted model is given, whatever code around it did. Backward may run
    after the block. Inside compiled code, a list of names is compiled in: enter the block outside,
    or give it a tensor.

    Sliding windows are samples to the model: where windows of several volumes share a batch, as in
    MONAI's ``sliding_window_inference``, take each one's label by its place, which MONAI gives
    with ``with_coord=True``: ``lambda w, at: model(w, context=labels[[i.start for i, *_ in at]])``.

    Args:
        model: a converted model, or a module that holds one.
        context: labels as the model's forward takes them.

    Raises:
        ConversionError: no converted model in `model`.
        ContextError: labels that do not fit; or blocks that end in another order, thread or task
            than they began.
    """
    expect_module(model)
    scopes = scopes_of(model)
    if not scopes:
        raise not_converted(model, " with a method that takes labels")
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    resolved = [None if context is None else s.resolve(context, device) for s in scopes]
    opened = [s.open(given) for s, given in zip(scopes, resolved, strict=True)]
    try:
        yield
    finally:
        innermost = [s.close(o) for s, o in zip(reversed(scopes), reversed(opened), strict=True)]
    if not all(innermost):
        raise ContextError(
            "expected blocks of normswap.use_context to end innermost first, got one that ends "
            "before a later one, as those of generators that take turns do: forwards in both had "
            "the labels of the later one; pass context=, or open one block for each forward"
        )
