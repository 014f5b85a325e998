"""What collections and objects hold, whatever a class of a user's makes of its own methods."""

import copyreg
import operator
from collections import deque
from collections.abc import Iterator
from typing import Any

COLLECTIONS = (list, tuple, set, frozenset, deque, dict)


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


def holds(collection: Any, kept: Any) -> bool:
    """Return whether a collection holds the same objects in the same order as another."""
    if len(collection) != len(kept) or not all(map(operator.is_, collection, kept)):
        return False
    return not isinstance(kept, dict) or all(map(operator.is_, collection.values(), kept.values()))


def slots_of(value: object) -> list[str]:
    """Return the names of the slots of an object, which may hold nothing; none of a class."""
    names: list[str] = [] if isinstance(value, type) else copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return names
