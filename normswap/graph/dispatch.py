"""Run a container of a converted model: hand the context to the norms below.

Looks for a graph that was traced for the kinds of the arguments and for the attributes the module
has now, and runs it; where no graph stands for the module's own forward, that forward runs, with
the context in scope.

In order: `dispatch` explains errors; `_with_schedule` draws for the layers of a scheduled method;
`_with_layers` runs those inserted before and after the model; `_run` checks the labels, measures
rows and finds the graph; `_run_variant` runs it, or the forward.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from normswap.errors import ConversionError, InputError, NormswapError
from normswap.functional.labels import Context, Labels
from normswap.graph.other_tools import is_symbolic, run_symbolic
from normswap.graph.own_forward import in_scope, own_forward, run_scoped
from normswap.graph.prepare import prepare
from normswap.graph.questions.bypassed import explain
from normswap.graph.questions.class_answers import answered
from normswap.graph.scope.incoming import enter_context, resolve
from normswap.graph.scope.scope import RUNNING, Scope
from normswap.graph.state import (
    UNTRACED,
    ContainerState,
    Values,
    Variant,
    context_argument,
)
from normswap.graph.tracing import Kind, TraceFailure, TraceSession, describe, tracing
from normswap.util.original_class import STATE

# What a container is given: labels, where the model is called; else what these became.
Given: TypeAlias = Context | Labels | None


def dispatch(module: nn.Module, values: Values, context: Given) -> Any:
    """Run a container: the forward of every converted container ends here."""
    if tracing():
        return own_forward(module, values)
    state: ContainerState | None = vars(module).get(STATE) or _adopt(module)
    if state is None:
        return own_forward(module, values)
    if torch.compiler.is_compiling():
        return _with_schedule(module, state, values, context)
    try:
        return _with_schedule(module, state, values, context)
    except NormswapError:
        raise
    except Exception as error:
        explained = explain(error, state.fqn)
        if explained is None:
            raise
        raise explained from error


def _with_schedule(module: nn.Module, state: ContainerState, values: Values, context: Given) -> Any:
    if type(context) is not Context and is_symbolic(values):
        return run_symbolic(module, state, values, context)
    if state.schedule is not None and module.training:
        state.schedule.begin(_device_of(values))
        try:
            return _with_layers(module, state, values, context)
        finally:
            state.schedule.end()
    if state.before is None and state.after is None:
        return _run(module, state, values, context)
    return _with_layers(module, state, values, context)


def calling(call: Callable[..., Any], argument: str | None) -> Callable[..., Any]:
    """Return a ``__call__`` that runs a class's own once, its context in scope.

    What the class's own ``__call__`` makes of its arguments need not hand on the context.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracing():
            raise TraceFailure(f"calls a {type(self).__name__}, whose class has its own __call__")
        state: ContainerState | None = vars(self).get(STATE) or _adopt(self)
        context = kwargs.pop(argument, None) if argument is not None else None
        if state is None or context is None:
            return call(self, *args, **kwargs)
        context = resolve(state, (), tree_leaves((args, kwargs)), context)
        outer = state.scope.enter(context)
        try:
            return call(self, *args, **kwargs)
        finally:
            state.scope.leave(outer)

    return __call__


def _with_layers(module: nn.Module, state: ContainerState, values: Values, context: Given) -> Any:
    """Run the container between the layers inserted before and after it."""
    if state.before is not None:
        layer = getattr(module, state.before)
        given = {} if context_argument(layer) is None else {"context": context}
        values = (layer(_expect_tensor(values[0], state, "take"), **given), *values[1:])
    output = _run(module, state, values, context)
    if state.after is None:
        return output
    return getattr(module, state.after)(_expect_tensor(output, state, "return"))


def _expect_tensor(value: object, state: ContainerState, verb: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        where = "before" if verb == "take" else "after"
        raise InputError(
            f"expected {state.fqn or 'the model'} to {verb} a tensor, for the layer inserted "
            f"{where} it, got a {type(value).__name__}; select another place, see placement="
        )
    return value


def _device_of(values: Values) -> torch.device | None:
    return next((v.device for v in values if isinstance(v, torch.Tensor)), None)


def _run(module: nn.Module, state: ContainerState, values: Values, context: Given) -> Any:
    """Run the container without the layers around it."""
    if state.runs_own_forward:
        return answered(state.fqn, state.questions, own_forward)(module, values)
    leaves: list[object] = []
    key = tuple([describe(value, leaves) for value in values])
    context, mixed = enter_context(state, values, leaves, context, module.training)
    if mixed:
        assert context is not None
        rows = state.scope.rows
        return rows.run(module, state, lambda v, c: _run(module, state, v, c), values, context)
    variant = _find_variant(module, state, key, values)
    if context is None or state.fqn or torch.compiler.is_compiling():
        return _run_variant(module, state, variant, values, leaves, context)
    token = RUNNING.set(state.scope)
    try:
        return _run_variant(module, state, variant, values, leaves, context)
    finally:
        RUNNING.reset(token)


def _find_variant(
    module: nn.Module, state: ContainerState, key: tuple[Kind, ...], values: Values
) -> Variant:
    """Return the way to run the container on arguments of these kinds, traced now if need be."""
    if not state.trace:
        return UNTRACED
    if (variant := state.find(module, key)) is not None:
        return variant
    if torch.compiler.is_dynamo_compiling():
        return Variant(None, "met a new kind of arguments inside torch.compile")
    with TraceSession(state.layers) as session:
        return prepare(module, values, session)


def _run_variant(
    module: nn.Module,
    state: ContainerState,
    variant: Variant,
    values: Values,
    leaves: list[object],
    context: Context | None,
) -> Any:
    if variant.run is None:
        if state.insertions:
            raise _untraced(state, variant.reason)
        return run_scoped(module, values, context)
    given = (module, *leaves, context)
    if variant.scoped or (context is None and state.layers and not state.scope.entered):
        return in_scope(state.scope, context, variant.run, *given)
    return variant.run(*given)


def _untraced(state: ContainerState, reason: str) -> ConversionError:
    """Return the error of a container that runs without the layers inserted in it."""
    return ConversionError(
        f"expected {state.fqn or 'the model'} to run as it was traced, since layers are inserted "
        f"in its residual blocks, but its forward {reason}"
    )


def _adopt(module: nn.Module) -> ContainerState | None:
    """Make a container of a module that a class made of itself, as slicing a Sequential does.

    Returns:
        Its state; None where there is no norm below it.
    """
    norms = {
        m: scope for m in module.modules() if isinstance(scope := getattr(m, "scope", None), Scope)
    }
    if not norms:
        return None
    norm, scope = next(iter(norms.items()))
    kinds = tuple({type(m) for m in norms})
    state = ContainerState("(slice)", scope, kinds, str(norm.site))
    module.__dict__[STATE] = state
    return state
