"""Run a container of a converted model: hand the context to the norms below.

Looks for a graph that was traced for the kinds of the arguments and for the attributes the module
has now, and runs it; where no graph stands for the module's own forward, that forward runs, with
the context in scope.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from normswap.errors import InputError, NormswapError
from normswap.functional.backward import in_backward
from normswap.functional.labels import Context, wrong_length
from normswap.graph.bypassed import explain
from normswap.graph.class_questions import check_question
from normswap.graph.foreign import is_symbolic, run_symbolic
from normswap.graph.prepare import open_session, prepare
from normswap.graph.scope import Scope
from normswap.graph.state import (
    ContainerState,
    Variant,
    context_argument,
    in_scope,
    own_forward,
    run_scoped,
    untraced,
)
from normswap.graph.tracing import TraceFailure, aliased, describe, tracing, write_back
from normswap.util.original_class import STATE


def dispatch(module: nn.Module, values: tuple[Any, ...], context: Any) -> Any:
    """Run a container: the forward of every converted container ends here."""
    if tracing():
        return own_forward(module, values)
    state: ContainerState | None = vars(module).get(STATE) or _adopt(module)
    if state is None:
        return own_forward(module, values)
    if torch.compiler.is_compiling():
        return _dispatch(module, state, values, context)
    try:
        return _dispatch(module, state, values, context)
    except NormswapError:
        raise
    except Exception as error:
        explained = explain(error, state.fqn)
        if explained is None:
            raise
        raise explained from error


def _dispatch(
    module: nn.Module, state: ContainerState, values: tuple[Any, ...], context: Any
) -> Any:
    if type(context) is not Context and is_symbolic(values):
        return run_symbolic(module, state, values, context)
    if state.schedule is not None and module.training:
        state.schedule.begin(_device_of(values))
        try:
            return _run_around(module, state, values, context)
        finally:
            state.schedule.end()
    if state.before is None and state.after is None:
        return _run(module, state, values, context)
    return _run_around(module, state, values, context)


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
        context = _resolve(state, (), tree_leaves((args, kwargs)), context)
        outer = state.scope.enter(context)
        try:
            return call(self, *args, **kwargs)
        finally:
            state.scope.leave(outer)

    return __call__


def _run_around(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    """Run the container between the layers inserted before and after it."""
    if state.before is not None:
        layer = getattr(module, state.before)
        given = {} if context_argument(layer) is None else {"context": context}
        values = (layer(_expect_tensor(values[0], state, "take"), **given), *values[1:])
    output = _run(module, state, values, context)
    if state.after is None:
        return output
    return getattr(module, state.after)(_expect_tensor(output, state, "return"))


def _expect_tensor(value: Any, state: ContainerState, verb: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        where = "before" if verb == "take" else "after"
        raise InputError(
            f"expected {state.fqn or 'the model'} to {verb} a tensor, for the layer inserted "
            f"{where} it, got a {type(value).__name__}; select another place, see placement="
        )
    return value


def _device_of(values: tuple[Any, ...]) -> torch.device | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
    return None


def _run(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    if state.runs_own_forward:
        check_question(state.fqn, state.question)
        return own_forward(module, values)
    leaves: list[Any] = []
    key = tuple([describe(value, leaves) for value in values])
    entered = type(context) is not Context
    context = _resolve(state, values, leaves, context)
    if entered and context is not None:
        if _is_single(context, values):
            context = Context(context.labels[:1], context.unknown, True)
        elif _may_mix(context):
            rows = state.scope.rows
            return rows.run(module, state, lambda v, c: _run(module, state, v, c), values, context)
    if not state.trace:
        return run_scoped(module, values, context)
    for variant in state.variants.get(key, ()):
        if variant.holds(module):
            break
    else:
        if torch.compiler.is_dynamo_compiling():
            variant = Variant(None, "met a new kind of arguments inside torch.compile")
        else:
            return _run_new(module, state, values, context)
    if variant.run is None or (variant.writes and aliased(values)):
        if state.insertions:
            raise untraced(module, variant.reason or "changes a list or dict it is given twice")
        return run_scoped(module, values, context)
    # A graph writes when it is done, and a recomputation stops where nothing more is needed.
    if variant.writes and in_backward() and not state.insertions:
        return run_scoped(module, values, context)
    if variant.calls_user_code:  # code of the user's runs in it
        check_question(state.fqn, state.question)
    given = (module, *leaves, context)
    if variant.scoped or (context is None and state.layers and not state.scope.entered):
        output = in_scope(state.scope, context, variant.run, *given)
    else:
        output = variant.run(*given)
    if variant.writes:
        output, contents = output
        for (index, _), new in zip(variant.writes, contents):  # noqa: B905 - for dynamo
            write_back(values[index], new)
    return output


def _is_single(context: Context, values: tuple[Any, ...]) -> bool:
    """Return whether the host can see that all samples have one label."""
    labels = context.labels
    if context.unknown is None or context.whole or labels.device.type != "cpu" or len(labels) < 2:
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if not any(len(labels) in _batch_sizes(value) for value in values):
        return False
    return bool((labels == labels[0]).all())


def _may_mix(context: Context) -> bool:
    """Return whether rows have to be told apart, and can be: values are there."""
    labels = context.labels
    if torch.compiler.is_compiling() or torch._C._is_tracing() or context.whole:
        return False
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return type(labels) is torch.Tensor and not labels.is_meta and len(labels) > 1


def _adopt(module: nn.Module) -> ContainerState | None:
    """Make a container of a module that a class made of itself, as slicing a Sequential does.

    Returns:
        Its state; None where there is no norm below it.
    """
    norms = [m for m in module.modules() if isinstance(getattr(m, "scope", None), Scope)]
    if not norms:
        return None
    scope: Any = norms[0].scope
    kinds = tuple({type(m) for m in norms})
    state = ContainerState("(slice)", scope, kinds, str(norms[0].site))
    module.__dict__[STATE] = state
    return state


def _run_new(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    with open_session(state.layers) as session:
        prepare(module, values, session)
    return _run(module, state, values, context)


def _resolve(
    state: ContainerState, values: tuple[Any, ...], leaves: list[Any], context: Any
) -> Context | None:
    """Return the context of this call, checked where it enters the model."""
    if type(context) is Context:
        return context
    if context is None:
        resolved = state.scope.lookup(whole=state.fqn == "")
    else:
        device = next((leaf.device for leaf in leaves if hasattr(leaf, "device")), None)
        resolved = state.scope.resolve(context, device)
    if resolved is not None and state.fqn == "":
        _check_length(state, values, resolved)
    return resolved


def _check_length(state: ContainerState, values: tuple[Any, ...], context: Context) -> None:
    """Compare the number of labels with the batch, while it is not folded into anything yet."""
    given = context.labels.shape[0]
    sizes = [size for value in values for size in _batch_sizes(value)]
    if sizes and not context.whole and given not in sizes:
        raise wrong_length(sizes[0], given, state.first_norm)


def _batch_sizes(value: Any) -> list[int]:
    """Return what may be the number of samples in an argument."""
    if isinstance(value, torch.Tensor):
        return [value.shape[0]] if value.dim() else []
    if isinstance(value, dict):
        return [size for part in value.values() for size in _batch_sizes(part)]
    if isinstance(value, (list, tuple)):
        sizes = [size for part in value for size in _batch_sizes(part)]
        # A list of images, one a sample: detection models take batches so.
        if value and all(isinstance(v, torch.Tensor) and v.dim() <= 3 for v in value):
            sizes.append(len(value))
        return sizes
    return []
