"""The labels of a call, where they enter a converted model: checked against the batch."""

import torch

from normswap.functional.backend import is_readable
from normswap.functional.label_rows import wrong_length
from normswap.functional.labels import Context, Labels
from normswap.graph.scope.scope import RUNNING
from normswap.graph.state import ContainerState, Values


def enter_context(
    state: ContainerState,
    values: Values,
    leaves: list[object],
    context: Context | Labels | None,
    training: bool,
) -> tuple[Context | None, bool]:
    """Return the context of this call, and whether the rows of samples have to be told apart.

    Where labels enter the model they are checked, and are one where all are the same.
    """
    if type(context) is Context:
        return context, False
    resolved = resolve(state, values, leaves, context)
    if resolved is None or not state.fqn:
        state.scope.model.watch.note(resolved, training, state.scope.names)
    if resolved is None:
        return None, False
    if _is_single(resolved, values):
        return Context(resolved.labels[:1], resolved.unknown, True), False
    return resolved, _may_mix(resolved)


def resolve(
    state: ContainerState,
    values: Values,
    leaves: list[object],
    context: Labels | None,
) -> Context | None:
    """Return the context of this call, checked where it enters the model."""
    # A forward may call the whole model on other rows, which are told apart as those of a part.
    compiling = torch.compiler.is_compiling()  # which cannot ask
    inside = context is None and not compiling and RUNNING.get() is state.scope
    if context is None:
        resolved = state.scope.lookup(whole=state.fqn == "")
    else:
        device = next((leaf.device for leaf in leaves if hasattr(leaf, "device")), None)
        resolved = state.scope.resolve(context, device)
    if resolved is not None and state.fqn == "" and not inside:
        _check_length(state, values, resolved)
    return resolved


def _check_length(state: ContainerState, values: Values, context: Context) -> None:
    """Compare the number of labels with the batch, while it is not folded into anything yet."""
    given = context.labels.shape[0]
    sizes = [size for value in values for size in _batch_sizes(value)]
    if sizes and not context.whole and given not in sizes:
        expected = " or ".join(map(str, dict.fromkeys(sizes)))
        raise wrong_length(expected, given, state.first_norm)


def _batch_sizes(value: object) -> list[int]:
    """Return what may be the number of samples in an argument."""
    if isinstance(value, torch.Tensor):
        return [value.size(0)] if value.dim() else []  # nested tensors have no shape
    if isinstance(value, dict):
        return [size for part in value.values() for size in _batch_sizes(part)]
    if isinstance(value, (list, tuple)):
        sizes = [size for part in value for size in _batch_sizes(part)]
        # A list of images, one a sample, or of dicts with them: detection models take batches so.
        if value and all(
            v.dim() <= 3 if isinstance(v, torch.Tensor) else isinstance(v, (dict, list, tuple))
            for v in value
        ):
            sizes.append(len(value))
        return sizes
    return []


def _is_single(context: Context, values: Values) -> bool:
    """Return whether the host can see that all samples have one label."""
    labels = context.labels
    if context.unknown is None or context.whole or labels.device.type != "cpu" or len(labels) < 2:
        return False
    if not is_readable(labels):
        return False
    if not any(len(labels) in _batch_sizes(value) for value in values):
        return False
    return bool((labels == labels[0]).all())


def _may_mix(context: Context) -> bool:
    """Return whether rows have to be told apart, and can be: values are there."""
    labels = context.labels
    if context.whole or not is_readable(labels) or len(labels) < 2:
        return False
    return not (labels.is_cuda and torch.cuda.is_current_stream_capturing())
