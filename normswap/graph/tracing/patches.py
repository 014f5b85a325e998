"""What tracing replaces while it runs: names of a forward's own module, and some of torch's."""

from collections.abc import Callable
from typing import Any

_MISSING = object()


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


def stand_for(replacement: Callable[..., Any], original: object) -> Callable[..., Any]:
    """Mark what stands for another thing while a trace runs; return it."""
    vars(replacement)["normswap_original"] = original
    return replacement
