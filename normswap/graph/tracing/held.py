"""Objects that a module holds and its forward reads: settings, caches, helpers.

A graph remembers what the forward saw in them. What it can compare it compares before each run;
what the forward changes in them it would change while tracing only, so that ends the trace.
"""

import enum
import random
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.tracing.patches import TraceFailure

_PLAIN = (
    *(bool, int, float, str, bytes, type(None), type, enum.Enum),
    *(torch.dtype, torch.device, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType),
)
DRAWS = "draws Python or NumPy random numbers inside forward"
_MOST_PARTS = 64
_DEPTH = 3


def is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Return whether a value can be compared with what it was."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, tuple | list | set | frozenset) and depth:
        return len(value) <= _MOST_PARTS and all(is_plain(v, depth - 1) for v in value)
    if isinstance(value, dict) and depth:
        return len(value) <= _MOST_PARTS and all(is_plain(v, depth - 1) for v in value.values())
    return False


def snapshot(value: Any) -> Any:
    """Copy the lists, dicts and sets of a plain value."""
    if isinstance(value, list):
        return [snapshot(v) for v in value]
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    return set(value) if isinstance(value, set) else value


def restore(target: Any, value: Any) -> None:
    """Give a list, dict or set its former contents."""
    target.clear()
    target.extend(value) if isinstance(target, list) else target.update(value)


def random_states() -> list[Any]:
    """Return the states of Python's and NumPy's generators, to be compared."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate(), None]
    state = numpy.random.get_state()
    return [random.getstate(), (state[1].tobytes(), *state[2:])]


def _contents(value: Any) -> Any:
    """Return what of an object can change and be put back; None where that is nothing."""
    if isinstance(value, list | dict | set):
        return value
    skip = (Tensor, nn.Module, torch.autograd.Function, types.ModuleType)
    table = getattr(value, "__dict__", None)
    return table if isinstance(table, dict) and not isinstance(value, skip) else None


@dataclass
class Held:
    """What a forward read while it was traced.

    Attributes:
        objects: path from the container -> object, and a shallow copy of its contents.
        names: names that the functions entered look up, as attributes among others.
    """

    objects: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def hold(self, path: str, value: Any) -> None:
        """Remember an object.

        Raises:
            TraceFailure: a source of random numbers.
        """
        if isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random"):
            raise TraceFailure(DRAWS)
        contents = _contents(value)
        if contents is not None and path not in self.objects:
            self.objects[path] = (value, type(contents)(contents))

    def release(self) -> str:
        """Put back what the forward changed; return the path of one such object, or ""."""
        changed = ""
        for path, (value, before) in self.objects.items():
            contents = _contents(value)
            if not _same(contents, before):
                restore(contents, before)
                changed = changed or path
        return changed

    def settings(self) -> dict[tuple[str, str], Any]:
        """Return (path of an object, attribute) -> value, for what a forward may branch on."""
        found: dict[tuple[str, str], Any] = {}
        for path, (value, _) in self.objects.items():
            if not isinstance(value, list | dict | set):
                self._read(path, value, found, _DEPTH)
        return found

    def _read(self, path: str, value: Any, found: dict[tuple[str, str], Any], depth: int) -> None:
        for name in self.names:
            if name in vars(value) or isinstance(getattr(type(value), name, None), property):
                now = getattr(value, name)
                if is_plain(now):
                    found[path, name] = snapshot(now)
                elif depth and not isinstance(now, list | dict | set) and _contents(now):
                    self._read(f"{path}.{name}", now, found, depth - 1)


def put_back(root: nn.Module, reads: dict[tuple[str, str], Any], held: Held) -> str:
    """Undo what a forward changed while it was traced; return what that was, or ""."""
    changed = ""
    for (path, name), value in reads.items():
        now = getattr(root.get_submodule(path), name)
        if type(now) is not type(value) or now != value:
            if isinstance(now, list | dict | set):
                restore(now, value)
            changed = changed or name
    return changed or held.release()


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, list):
        return all(a is b for a, b in zip(now, before, strict=True))
    if isinstance(now, dict):
        return all(k in before and before[k] is v for k, v in now.items())
    return bool(now == before)
