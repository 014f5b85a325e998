"""What collections and objects hold, whatever a class of a user's makes of its own methods."""

import copyreg
import operator
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

COLLECTIONS = (list, tuple, set, frozenset, deque, dict)
_SCALARS = frozenset({type(None), bool, int, float, str})
_EMPTY = frozenset({*COLLECTIONS, OrderedDict})


def holds_nothing(value: object) -> bool:
    """Return whether a value is a scalar or empty, as most attributes of modules are."""
    kind = type(value)
    return kind in _SCALARS or (kind in _EMPTY and not value)


def elements_of(value: Any) -> Iterator[Any]:
    """Iterate over the elements of a collection, or the values of a dict; else over nothing.

    By the methods of Python's own classes: those of a subclass may raise, as `len` of e3nn's
    `Irrep`, which is a tuple, or change something.
    """
    if isinstance(value, dict):
        return iter(dict.values(value))
    base: Any = next((cls for cls in COLLECTIONS if isinstance(value, cls)), None)
    elements: Iterator[Any] = iter(()) if base is None else base.__iter__(value)
    return elements


def contents_of(collection: Any) -> list[Any]:
    """Return what a collection holds: its elements, or the keys of a dict, then its values."""
    if isinstance(collection, dict):
        base: Any = OrderedDict if isinstance(collection, OrderedDict) else dict
        return [*base.keys(collection), *base.values(collection)]
    return [*elements_of(collection)]


def holds(collection: Any, contents: list[Any]) -> bool:
    """Return whether a collection holds these objects in this order."""
    now = contents_of(collection)
    return len(now) == len(contents) and all(map(operator.is_, now, contents))


def refill(collection: Any, contents: list[Any]) -> None:
    """Have a collection hold what `contents_of` returned, and nothing else."""
    bases: Any = (list, deque, set, OrderedDict, dict)
    base = next(cls for cls in bases if isinstance(collection, cls))
    base.clear(collection)
    if issubclass(base, dict):
        half = len(contents) // 2
        for key, value in zip(contents[:half], contents[half:], strict=True):
            base.__setitem__(collection, key, value)
    else:
        (base.update if base is set else base.extend)(collection, contents)


def slots_of(value: object) -> list[str]:
    """Return the names of the slots of an object, which may hold nothing; none of a class."""
    names: list[str] = [] if isinstance(value, type) else copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return names
