"""Lists and dicts that a forward is given, or hands on.

A graph takes such an argument apart and makes it anew for its callees, so that a change of one
would be lost. A forward that changes or returns one is scoped; so is one that hands its own to a
module, unless a graph stands for that module on such arguments, which then does neither.

Serves DenseNet and DLA in timm, which hand lists of features to their layers.
"""

from dataclasses import is_dataclass
from typing import Any

from torch import fx, nn

from normswap.graph.tracing.failure import TraceFailure, is_torch
from normswap.graph.tracing.value_kinds import any_leaf, find_lists
from normswap.util.elements import elements_of
from normswap.util.original_class import container_class

Contents = list[tuple[Any, list[tuple[Any, Any]]]]


def snapshot_lists(values: Any) -> Contents:
    """Return every list and dict inside some values, with its contents."""
    return [(holder, _contents(holder)) for holder in find_lists(values)]


def check_given(before: Contents, output: Any) -> None:
    """Compare what a forward was given with what it was.

    Raises:
        TraceFailure: it changed a list or dict, or returns one.
    """
    if not all(_same(_contents(holder), old) for holder, old in before):
        raise TraceFailure("changes a list or dict it is given")
    if any(holder is given for holder in find_lists(output) for given, _ in before):
        raise TraceFailure("returns a list or dict it was given")


def may_be_changed(value: Any) -> bool:
    """Return whether a callee could change a list or dict to something a graph would not see.

    Constants in a list are mostly written in the call, for nobody else to see. Objects of data
    classes, which a graph builds anew, count as lists.
    """
    return holds_objects(value) or any(
        not holder or any_leaf(holder, (fx.Proxy,)) for holder in find_lists(value)
    )


def holds_objects(value: Any) -> bool:
    """Return whether a value is, or holds, an object whose fields can be set."""
    if isinstance(value, list | tuple | dict) and not is_dataclass(value):
        return any(map(holds_objects, elements_of(value)))
    frozen = getattr(type(value), "__dataclass_params__", None)
    return frozen is not None and not frozen.frozen


def hands_lists(tracer: Any, module: nn.Module, given: tuple[Any, ...]) -> bool:
    """Return whether a call of a module hands it lists or dicts that its code could change."""
    if not any(map(may_be_changed, given)) and not any(map(tracer.reads.holds, find_lists(given))):
        return False
    return not all(is_torch(container_class(m).__module__) for m in module.modules())


def _contents(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def _same(now: list[tuple[Any, Any]], old: list[tuple[Any, Any]]) -> bool:
    pairs = zip(now, old, strict=False)
    return len(now) == len(old) and all(a == c and b is d for (a, b), (c, d) in pairs)
