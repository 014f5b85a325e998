"""Run a container of a converted model: hand the context to the norms below.

Looks for a graph that was traced for the kinds of the arguments and for the attributes the module
has now, and runs it; where no graph stands for the module's own forward, that forward runs, with
the context in scope.
"""

from typing import Any

import torch
from torch import nn

from normswap.functional.labels import Context, wrong_length
from normswap.graph.prepare import prepare
from normswap.graph.state import ContainerState, Variant, own_forward
from normswap.graph.trace import TraceSession, tracing
from normswap.graph.values import describe


def dispatch(module: nn.Module, values: tuple[Any, ...], context: Any) -> Any:
    """Run a container: the forward of every converted container ends here."""
    if tracing():
        return own_forward(module, values)
    state: ContainerState = module._normswap  # type: ignore[assignment]
    leaves: list[Any] = []
    key = tuple([describe(value, leaves, False) for value in values])
    if key in state.exact:
        leaves = []
        key = tuple([describe(value, leaves, True) for value in values])
    context = _resolve(state, values, leaves, context)
    for variant in state.variants.get(key, ()):
        if variant.holds(module):
            break
    else:
        if torch.compiler.is_dynamo_compiling():
            variant = Variant(None, "met a new kind of arguments inside torch.compile")
        else:
            return _run_new(module, state, values, context)
    if variant.run is not None:
        return variant.run(module, *leaves, context)
    return _run_scoped(module, state, values, context)


def _run_new(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    with TraceSession(state.layers) as session:
        prepare(module, values, session)
    return dispatch(module, values, context)


def _run_scoped(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    outer = state.scope.enter(context)
    try:
        return own_forward(module, values)
    finally:
        state.scope.leave(outer)


def _resolve(
    state: ContainerState, values: tuple[Any, ...], leaves: list[Any], context: Any
) -> Context | None:
    """Return the context of this call, checked where it enters the model."""
    if type(context) is Context:
        return context
    if context is None:
        resolved = state.scope.lookup()
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
    if isinstance(value, list | tuple):
        sizes = [size for part in value for size in _batch_sizes(part)]
        # A list of images, one a sample: detection models take batches so.
        if value and all(isinstance(v, torch.Tensor) and v.dim() <= 3 for v in value):
            sizes.append(len(value))
        return sizes
    return []
