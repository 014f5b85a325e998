"""Run the forward that a container had before conversion, the context in scope."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

from torch import nn

from normswap.errors import ConversionError
from normswap.functional.labels import Context
from normswap.graph.questions.class_answers import answered
from normswap.graph.scope.scope import Scope
from normswap.graph.state import ContainerState, Values, forward_of, state_of
from normswap.util.original_class import STATE

# Iterators over what is there already.
_MADE: tuple[Any, ...] = ([], (), {}.keys(), {}.values(), {}.items())
_COMPUTED = tuple(type(iter(made)) for made in _MADE)


def own_forward(module: nn.Module, values: Values) -> Any:
    """Run the forward the module had before conversion."""
    cls: Any = type(module)
    state, spread = state_of(module), forward_of(module).spread
    override = None if state is None else state.override
    if override is None and cls._normswap_bound:
        owner: Any = next(c for c in cls.__mro__ if "_normswap_from" in vars(c))
        override = super(owner, module).forward
    if override is not None:
        return spread(lambda _, *args, **kwargs: override(*args, **kwargs), module, values)
    return spread(cls._normswap_from.forward, module, values)


def run_scoped(module: nn.Module, values: Values, context: Context | None) -> Any:
    """Run the forward the module had before conversion, with the context in scope.

    Raises:
        ConversionError: there are labels, and it returns what is awaited, or goes on later.
    """
    state: ContainerState = vars(module)[STATE]
    run = answered(state.fqn, state.questions, own_forward)
    output = in_scope(state.scope, context, run, module, values)
    # A tuple, not a union: torch 2.9's compiler does not take isinstance of a union.
    later = isinstance(output, (Awaitable, AsyncIterator, Iterator))
    if context is not None and later and not isinstance(output, _COMPUTED):
        if isinstance(output, Coroutine):
            output.close()
        raise ConversionError(
            f"expected the forward of {state.fqn or 'the model'} to return what it computed, got a "
            f"{type(output).__name__}, which runs when the labels are gone; write it without async,"
            " and return a list in place of a generator or map"
        )
    return output


def in_scope(scope: Scope, context: Context | None, run: Callable[..., Any], *args: object) -> Any:
    """Call a function with a context in scope."""
    left = scope.enter(context)
    try:
        return run(*args)
    finally:
        scope.leave(left)
