"""What a forward read while it was traced: compared before each run of its graph."""

import copy
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.graph.code.library import is_library
from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.whitelist import FUNCTIONS, is_constant, why_unfit

_MOST_PARTS = 256
_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__", "__dict__")
# Stand for an attribute that is not there, and for any tensor: a graph reads that anew.
MISSING, ANY_TENSOR = object(), object()
Path = tuple[str, ...]


class Guards(NamedTuple):
    """What must be as it was for a graph to stand for a forward.

    Attributes:
        attributes: (path of a module, name, value).
        children: (path of a module, names of its children).
        methods: (path of a module, name, the function its class has there).
        names: (dict of globals or a class, name, value), of what lies outside of the module.
        of_library: the same, of what leads to torch's own, as tools exchange attention; compiled
            code takes that as it is.
    """

    attributes: tuple[tuple[Path, str, object], ...] = ()
    children: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    methods: tuple[tuple[Path, str, object], ...] = ()
    names: tuple[tuple[object, str, object], ...] = ()
    of_library: tuple[tuple[object, str, object], ...] = ()

    def hold(self, module: nn.Module) -> bool:
        """Return whether everything is as it was."""
        for path, children in self.children:  # from the root down: further paths go by these
            if tuple(walk(module, path)._modules) != children:
                return False
        for path, name, value in self.attributes:
            if not alike(getattr(walk(module, path), name, MISSING), value):
                return False
        for path, name, value in self.methods:
            owner = walk(module, path)
            if name in owner.__dict__ or _function(getattr(type(owner), name, None)) is not value:
                return False
        names = self.names
        if not torch.compiler.is_compiling():
            names += self.of_library
        for holder, name, value in names:
            now = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            # A compiler knows no attributes of dicts, nor of numbers once it saw one change.
            if not alike(now if isinstance(value, (int, float, dict)) else _function(now), value):
                return False
        return True


NO_GUARDS = Guards()


def alike(now: Any, then: Any) -> bool:
    """Return whether a value is what it was: constants and containers by value, others by name."""
    if now is then:
        return True
    if then is ANY_TENSOR:
        return isinstance(now, Tensor)
    if type(now) is not type(then) or isinstance(then, (Tensor, nn.Module)):
        return False
    if isinstance(then, dict):
        return now.keys() == then.keys() and all([alike(now[key], then[key]) for key in then])
    if isinstance(then, tuple):
        return len(now) == len(then) and all([alike(a, b) for a, b in zip(now, then)])  # noqa: B905
    if isinstance(then, float) and then == 0:  # which divides as its sign says
        return bool(now == 0) and math.copysign(1.0, now) == math.copysign(1.0, then)
    return bool(now == then)


def walk(module: Any, path: Path) -> Any:
    """Return what is at a path of attributes."""
    for name in path:
        # A module's own look-up of a child is slow, and this runs in every forward.
        children: Any = module._modules if isinstance(module, nn.Module) else ()
        module = children[name] if name in children else getattr(module, name)
    return module


@contextmanager
def flipped(module: nn.Module, guards: Guards) -> Iterator[bool]:
    """Put the modules whose mode was read into the other one; yield whether there are any."""
    read = [walk(module, path) for path, name, _ in guards.attributes if name == "training"]
    for part in read:
        part.__dict__["training"] = not part.training
    try:
        yield bool(read)
    finally:
        for part in read:
            part.__dict__["training"] = not part.training


def _function(value: object) -> object:
    """Return the function of a bound method; other values as they are."""
    return getattr(value, "__func__", value)


class Reads:
    """Collects what a forward reads: the values of `Guards`, by path, and name or id and name."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[str, str], object] = {}
        self.children: dict[str, tuple[str, ...]] = {}
        self.methods: dict[tuple[str, str], object] = {}
        self.names: dict[tuple[int, str], tuple[object, str, object]] = {}
        self.of_library = dict(self.names)

    def attribute(self, path: str, name: str, value: object) -> None:
        """Note an attribute.

        Raises:
            TraceFailure: an object that cannot be compared with what it was, or a function that a
                graph may not call.
        """
        if isinstance(value, FUNCTIONS) and (why := why_unfit(value, f".{name}")):
            raise TraceFailure(why)
        if not _is_comparable(value):
            raise TraceFailure(
                f"reads .{name}, a {type(value).__name__}, which may have changed unnoticed"
            )
        if (path, name) not in self.attributes:
            self._add_code(value)
            self.attributes[path, name] = value

    def name(self, holder: object, name: str, value: object, of_library: bool = False) -> None:
        """Note what a global, or an attribute of a class, means, or leads to of torch's own."""
        table = self.of_library if of_library else self.names
        if (id(holder), name) not in table:
            table[id(holder), name] = (holder, name, _function(value))
            self._add_code(_function(value))

    def method(self, path: str, name: str, function: object) -> None:
        """Note which function the class of a module has."""
        self.methods[path, name] = function
        self._add_code(function)

    def _add_code(self, value: Any) -> None:
        """Note what functions run: IPython's autoreload puts new code into those there are."""
        for part in value if type(value) is tuple else ():
            self._add_code(part)
        known = (id(value), "__code__") in self.names
        if isinstance(value, types.FunctionType) and not (known or is_library(value.__module__)):
            if hasattr(value, "_torchdynamo_disable"):  # a graph would hold what it does
                raise TraceFailure(f"calls {value.__name__}(), which stays out of compiled code")
            held = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            held += tuple(vars(value).values())
            if not all(map(_may_be_held, held)):
                raise TraceFailure(
                    f"goes by {value.__name__}, whose defaults or attributes may change"
                )
            for name in _OF_FUNCTIONS:
                part = getattr(value, name)
                self.names[id(value), name] = (value, name, copy.copy(part))
            self._add_code(held)

    def guards(self) -> Guards:
        """Return what must hold for everything that was read to be right."""
        return Guards(
            tuple((_split(path), name, value) for (path, name), value in self.attributes.items()),
            tuple((_split(path), self.children[path]) for path in sorted(self.children)),
            tuple((_split(path), name, f) for (path, name), f in self.methods.items()),
            tuple(self.names.values()),
            tuple(self.of_library.values()),
        )


def _split(path: str) -> Path:
    return tuple(path.split(".")) if path else ()


def _is_comparable(value: Any) -> bool:
    if type(value) is tuple:
        return len(value) <= _MOST_PARTS and all(map(is_constant, value))
    return isinstance(value, (*FUNCTIONS, Tensor, nn.Module)) or is_constant(value)


def _may_be_held(value: Any) -> bool:
    """Return whether a function may have a value for a default, or an attribute."""
    if isinstance(value, FUNCTIONS):
        return not why_unfit(value, "")
    return is_constant(value) or isinstance(value, type)
