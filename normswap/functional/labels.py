"""Context labels: from what a caller gives to a checked tensor, and to one label per row of x."""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from normswap.errors import ContextError
from normswap.functional.backend import is_eager, is_readable
from normswap.util.arguments import describe, listed, unknown_name


class Context(NamedTuple):
    """Labels that were checked once, at the entry of a model, and now travel through it.

    Attributes:
        labels: int64, shape (N,), in [-1, K).
        unknown: True or False where the host knows whether a label is -1; None where finding out
            would make the host wait for a device, or the values are not there (tracing).
        whole: whether the one label there is holds for a whole batch of any size.
    """

    labels: Tensor
    unknown: bool | None
    whole: bool = False


T = TypeVar("T")
Labels: TypeAlias = Tensor | str | int | Sequence[str | int | None] | Context


def resolve_labels(
    labels: Labels, num_contexts: int, names: Sequence[str], device: torch.device | None = None
) -> Context:
    """Check labels in any accepted form and return them as a `Context`.

    Args:
        labels: integer tensor (N,) or scalar; a name or index for the whole batch; a sequence
            of names, indices or None. None and -1 mean unknown.
        num_contexts: K; labels lie in [-1, K).
        names: the K names, in order.
        device: where labels are put that are not on a device yet: a tensor on the CPU is, too.

    Returns:
        The checked labels. Values in a tensor on a device other than the CPU are checked by an
        assertion on that device, so that the host never waits.

    Raises:
        ContextError: not integers, more than one dimension, or out of range.
        UnknownNameError: a name that is not among `names`.
    """
    if isinstance(labels, Context):
        return labels
    # A compiler cannot ask a number that changes from call to call for attributes.
    if not isinstance(labels, (int, Tensor)) and hasattr(labels, "__array__"):
        if torch.compiler.is_compiling():  # which sees no mask; without fullgraph it gives up here
            raise ContextError(
                "expected `context` as a tensor or names in compiled code, got an array of NumPy; "
                "pass torch.as_tensor(labels), -1 where they are unknown"
            )
        # A masked array of NumPy says which are unknown, as a list alone.
        array: Any = labels if hasattr(labels, "filled") else labels.__array__()
        numbers = array.dtype.kind in "biufc" and array.dtype.isnative
        as_list = hasattr(labels, "filled") or not numbers
        labels = array.tolist() if as_list else torch.as_tensor(array, device="cpu")
    elif isinstance(labels, bool):
        labels = torch.tensor(labels, device="cpu")
    if not isinstance(labels, Tensor):
        indices = _to_indices(labels, names)
        limits = (min(indices), max(indices)) if indices else None
        if limits is not None:
            _require_range(*limits, num_contexts, names)
        values = _place(torch.tensor(indices, dtype=torch.int64, device="cpu"), device)
        whole = isinstance(labels, (str, int))
        return Context(with_memo(values, limits), -1 in indices, whole)
    if labels.is_nested or labels.layout != torch.strided:
        raise ContextError(
            "expected `context` as a dense tensor (N,), got one that is "
            f"{'nested' if labels.is_nested else str(labels.layout)[6:]}"
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ContextError(
            f"expected `context` of an integer dtype (int64), got {labels.dtype}; "
            "labels are indices of contexts, call .long() if that is what they hold"
        )
    if labels.dim() > 1:
        raise ContextError(
            f"expected `context` of shape (N,), one label per sample, got {tuple(labels.shape)}"
        )
    if is_eager() and type(labels).__torch_dispatch__ is Tensor.__torch_dispatch__:
        labels = labels.as_subclass(Tensor)  # what fastai's pick would be of their class, too
        if labels.is_inference() and not torch.is_inference_mode_enabled():
            labels = labels.clone()  # else none can be kept for backward
    whole = labels.dim() == 0
    labels = labels.long().reshape(-1)
    limits = _check_range(labels, num_contexts, names)
    unknown = None if limits is None else limits[0] < 0
    limits = limits if labels.numel() else None
    return Context(with_memo(_place(labels, device), limits), unknown, whole)


def _place(labels: Tensor, device: torch.device | None) -> Tensor:
    """Return checked labels on a device; where they come from the host, it does not wait."""
    if device is None or labels.device.type != "cpu" or labels.device == device:
        return labels
    if device.type != "cuda":
        # Memory that is not pinned may be gone before others have read it (pytorch/pytorch#139550).
        return labels.to(device)
    if is_eager() and type(labels) is Tensor:
        labels = labels.pin_memory()
    return labels.to(device, non_blocking=True)


class _Memo:
    """What was made of labels, in the state they had, inside or outside of a CUDA graph."""

    def __init__(self, labels: Tensor, limits: tuple[int, int] | None = None) -> None:
        self.labels_are = _state(labels)
        self.limits = limits
        self.made: dict[Hashable, Any] = {}


def _memo_of(labels: Tensor) -> _Memo | None:
    memo: _Memo | None = getattr(labels if labels._base is None else labels._base, "memo", None)
    return memo


def _state(labels: Tensor) -> tuple[int, bool]:
    captured = labels.is_cuda and torch.cuda.is_current_stream_capturing()
    return labels._version, captured


def with_memo(labels: Tensor, limits: tuple[int, int] | None = None) -> Tensor:
    """Return labels that remember what is made of them; see `kept`, and `host_range`."""
    if not is_eager() or type(labels) is not Tensor or labels.is_inference():
        return labels
    labels = labels.detach()
    labels.memo = _Memo(labels, limits)  # type: ignore[attr-defined]
    return labels


def host_range(labels: Tensor) -> tuple[int, int] | None:
    """Return the lowest and the highest of checked labels, None where the host was not told."""
    memo: _Memo | None = getattr(labels, "memo", None)
    return None if memo is None else memo.limits


def kept(labels: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Return what `make` makes of checked labels, or a view of them: once for all layers they meet.

    Not where labels were written to since they were checked, or a CUDA graph is captured since:
    what it computes has to be in it.
    """
    memo = _memo_of(labels)
    if memo is None or memo.labels_are != _state(labels):
        return make()
    place = (key, labels.shape, labels.stride(), labels.storage_offset())
    if place not in memo.made:
        memo.made[place] = make()
    found: T = memo.made[place]
    return found


def is_stale(labels: Tensor) -> bool:
    """Return whether checked labels were written to since."""
    memo = _memo_of(labels)
    return memo is not None and memo.labels_are[0] != labels._version


def _to_indices(labels: Any, names: Sequence[str]) -> list[int]:
    if isinstance(labels, (str, int)):
        labels = [labels]
    try:
        if isinstance(labels, Mapping | Set):
            raise TypeError  # of no order
        items = list(labels)
    except TypeError:
        raise ContextError(
            "expected `context` as an integer tensor (N,), a name, an index, or a sequence of "
            f"them, got {type(labels).__name__}"
        ) from None
    return [_to_index(item, names) for item in items]


def _to_index(item: Any, names: Sequence[str]) -> int:
    if isinstance(item, str):
        for index, name in enumerate(names):
            if name == item:
                return index
        raise unknown_name("context", item, names)
    if item is None:
        return -1
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    try:
        if isinstance(item, bool) or getattr(item, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(item)
    except TypeError:
        raise ContextError(
            "expected `context` to hold names, indices or None, "
            f"got {describe(item)} ({type(item).__name__})"
        ) from None


def _require_range(low: int, high: int, num_contexts: int, names: Sequence[str]) -> None:
    if low < -1 or high >= num_contexts:
        raise ContextError(
            f"expected `context` labels in [0, {num_contexts}), or -1 for unknown, got values "
            f"from {describe(low)} to {describe(high)}; the contexts are {listed(names)}"
        )


def _check_range(labels: Tensor, num_contexts: int, names: Sequence[str]) -> tuple[int, int] | None:
    """Return the range of labels, None if the host cannot know; raise if one is out of it."""
    if not is_readable(labels):
        return None
    if labels.numel() == 0:
        return 0, 0
    if is_under_vmap(labels):
        return None
    if labels.device.type != "cpu" and _asserts(labels.device.type):
        in_range = ((labels >= -1) & (labels < num_contexts)).all()
        torch._assert_async(in_range, f"context labels must lie in [-1, {num_contexts})")
        return None
    low, high = (int(v) for v in labels.aminmax())
    _require_range(low, high, num_contexts, names)
    return low, high


def _asserts(device_type: str) -> bool:
    """Return whether a device asserts by itself, while the host goes on."""
    if device_type == "cuda":
        return True
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key)


def is_under_vmap(t: Tensor) -> bool:
    """Return whether a tensor stands for those of a batch, whose values cannot be read."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False
