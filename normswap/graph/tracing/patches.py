"""What tracing replaces while it runs: names of the forward's own module, and a few of torch's."""

import builtins
import functools
import math
from collections.abc import Callable
from typing import Any

from torch import fx

from normswap.graph.tracing.value_kinds import any_leaf

_MISSING = object()
# Builtins that turn into calls in the graph when given symbolic values.
_BUILTINS = ("len", "max", "min", "round", "sum")
MATH = [n for n in vars(math) if not n.startswith("_") and callable(getattr(math, n))]


class Patches:
    """Replaces attributes and globals, and puts every one of them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, object]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        """Replace ``owner.name``, or ``owner[name]`` in a dict of globals."""
        table = owner if isinstance(owner, dict) else vars(owner)
        self._undo.append((owner, name, table.get(name, _MISSING)))
        _put(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._undo:
            _put(*self._undo.pop())


def _put(owner: Any, name: str, value: object) -> None:
    if value is not _MISSING:
        owner.update({name: value}) if isinstance(owner, dict) else setattr(owner, name, value)
    elif isinstance(owner, dict):
        owner.pop(name, None)
    else:
        delattr(owner, name)


def leaf_names(table: dict[str, object]) -> list[tuple[str, Callable[..., Any]]]:
    """Return the builtins that a module calls, and a graph when given symbolic values."""
    return [(name, getattr(builtins, name)) for name in _BUILTINS if name not in table]


def wrap_leaf(
    function: Callable[..., Any],
    record: Callable[[Callable[..., Any], Any, Any], Any],
) -> Callable[..., Any]:
    """Return a function that records calls with symbols."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (args, tuple(kwargs.values()))
        # The length of a list is known, whatever is in it.
        known = function is len and not isinstance(args[0], fx.Proxy)
        if not known and any_leaf(given, (fx.Proxy,)):
            return record(function, args, kwargs)
        return function(*args, **kwargs)

    return stand_for(call, function)


def stand_for(replacement: Callable[..., Any], original: object) -> Callable[..., Any]:
    """Mark what stands for another thing while a trace runs; return it."""
    vars(replacement)["normswap_original"] = original
    return replacement
