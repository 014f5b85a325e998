"""Lists and dicts that a forward is given, or hands on.

A graph takes such an argument apart and makes it anew for its callees, so that a change of one
would be lost. A forward that changes or returns one is scoped, as is one that hands its own on.
"""

from dataclasses import is_dataclass
from typing import Any, TypeAlias

from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.value_kinds import find_lists
from normswap.util.elements import contents_of, elements_of, holds

Contents: TypeAlias = list[tuple[Any, Any]]


def snapshot_lists(values: object) -> Contents:
    """Return every list and dict inside some values, with its contents."""
    return [(holder, contents_of(holder)) for holder in find_lists(values)]


def check_given(before: Contents, output: object) -> None:
    """Compare what a forward was given with what it was.

    Raises:
        TraceFailure: it changed a list or dict, or returns one.
    """
    if not all(holds(holder, old) for holder, old in before):
        raise TraceFailure("changes a list or dict it is given")
    if any(holder is given for holder in find_lists(output) for given, _ in before):
        raise TraceFailure("returns a list or dict it was given")


def check_handed(values: object, callee: str) -> None:
    """Look for what a callee could change, and the caller would see.

    Objects of data classes, which a graph builds anew, count as lists.

    Raises:
        TraceFailure: there is something.
    """
    if holds_objects(values) or any(True for _ in find_lists(values)):
        raise TraceFailure(f"hands a list or dict to {callee} that may change it")


def holds_objects(value: object) -> bool:
    """Return whether a value is, or holds, an object whose fields can be set."""
    if isinstance(value, list | tuple | dict) and not is_dataclass(value):
        return any(map(holds_objects, elements_of(value)))
    frozen = getattr(type(value), "__dataclass_params__", None)
    return frozen is not None and not frozen.frozen
