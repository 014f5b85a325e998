"""What a forward read while it was traced: put back if it changed, compared before each run."""

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.graph.tracing.containers import (
    copy_alone,
    copy_parts,
    find_mutable,
    restore,
    same_parts,
)
from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.parts import Part, parts_of, parts_of_class
from normswap.graph.tracing.whitelist import FUNCTIONS, cannot_change, is_built_in, is_constant

_MOST_PARTS = 256
# Stands for an attribute that is not there.
MISSING = object()


class Of(NamedTuple):
    """Stands for any object of a class: what is read of it is compared by itself."""

    cls: type


Path = tuple[str, ...]


class Guards(NamedTuple):
    """What must be as it was for a graph to stand for a forward.

    Attributes:
        attributes: (path of a module or of an object it holds, name, value).
        children: (path of a module, names of its children).
        methods: (path of a module, name, the function its class has there).
        names: (dict of globals or a class, name, value), of what lies outside of the module.
        properties: those of classes, likewise; a compiler cannot look at them.
    """

    attributes: tuple[tuple[Path, str, Any], ...] = ()
    children: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    methods: tuple[tuple[Path, str, Any], ...] = ()
    names: tuple[tuple[Any, str, Any], ...] = ()
    properties: tuple[tuple[Any, str, Any], ...] = ()

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
        for holder, name, value in self.names:
            now = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            # A compiler, once it saw a number change, knows no attributes of it.
            if not alike(now if isinstance(value, (int, float)) else _function(now), value):
                return False
        if torch.compiler.is_dynamo_compiling():
            return True
        return all([getattr(cls, name, None) is value for cls, name, value in self.properties])


NO_GUARDS = Guards()


def alike(now: Any, then: Any) -> bool:
    """Return whether a value is what it was: constants and containers by value, others by name."""
    if now is then:
        return True
    if isinstance(then, Of):
        return isinstance(now, Tensor) if then.cls is Tensor else type(now) is then.cls
    if type(now) is not type(then) or isinstance(then, (Tensor, nn.Module)):
        return False
    if isinstance(then, (list, tuple)):
        return len(now) == len(then) and all([alike(a, b) for a, b in zip(now, then)])  # noqa: B905
    if isinstance(then, dict):
        return list(now) == list(then) and all([alike(now[key], then[key]) for key in then])
    return bool(now == then)


def walk(module: Any, path: Path) -> Any:
    """Return what is at a path of attributes."""
    for name in path:
        module = getattr(module, name)
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


def _function(value: Any) -> Any:
    """Return the function of a bound method, and what stands behind a name while tracing."""
    value = getattr(value, "__func__", value)
    return getattr(value, "normswap_original", value)


class Reads:
    """Collects what a forward reads.

    Attributes:
        attributes: (path, name) -> a copy of the value.
        children: path of a module -> names of its children.
        methods: (path, name) -> function.
        names: (id of its holder, name) -> (holder, name, value).
    """

    def __init__(self) -> None:
        self.attributes: dict[tuple[str, str], Any] = {}
        self.children: dict[str, tuple[str, ...]] = {}
        self.methods: dict[tuple[str, str], Any] = {}
        self.names: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._defaults: dict[types.CodeType, tuple[Any, ...]] = {}
        self._mutable: list[tuple[str, Any, Any]] = []

    def attribute(self, path: str, name: str, value: Any) -> Any:
        """Note an attribute; return what the forward is to see of it.

        Raises:
            TraceFailure: an object that cannot be compared with what it was.
        """
        if _is_comparable(value):
            if (path, name) not in self.attributes:
                self._add_parts(parts_of(value))
                self.attributes[path, name] = copy_parts(value)
                self._mutable += [(name, part, copy_alone(part)) for part in find_mutable(value)]
            return value
        if callable(value) or not isinstance(getattr(value, "__dict__", None), dict):
            raise TraceFailure(
                f"reads .{name}, a {type(value).__name__}, which may have changed unnoticed"
            )
        self.attributes.setdefault((path, name), Of(type(value)))
        return Settings(value, f"{path}.{name}".lstrip("."), self)

    def name(self, holder: Any, name: str, value: Any) -> None:
        """Note what a global, or an attribute of a class, means."""
        if (id(holder), name) not in self.names:
            self.names[id(holder), name] = (holder, name, _function(value))
            self._add_parts(parts_of(_function(value)))

    def method(self, path: str, name: str, function: Any) -> None:
        """Note which function the class of a module has."""
        self.methods[path, name] = function
        self._add_parts(parts_of(function))

    def made(self, cls: type) -> None:
        """Note all attributes of a class of which an object is made."""
        self._add_parts(parts_of_class(cls))

    def default_of(self, code: types.CodeType, value: Any) -> bool:
        """Return whether a value is the default of an argument of a function that was read."""
        return any(value is default for default in self._defaults.get(code, ()))

    def _add_parts(self, parts: Iterable[Part]) -> None:
        for holder, name, value in parts:
            if name == "__code__":
                named = (holder.__kwdefaults__ or {}).values()
                self._defaults[value] = (*(holder.__defaults__ or ()), *named)
            self.names.setdefault((id(holder), name), (holder, name, copy_parts(_function(value))))

    def holds(self, value: Any) -> bool:
        """Return whether a list, dict or set is an attribute that was read."""
        return any(value is kept for _, kept, _ in self._mutable)

    def put_back(self) -> str:
        """Undo what the forward changed in the containers it read; return which, or ""."""
        changed = ""
        for name, value, before in self._mutable:
            if not same_parts(value, before):
                changed = changed or name
                restore(value, before)
        return changed

    def guards(self) -> Guards:
        """Return what must hold for everything that was read to be right."""
        names = self.names.values()
        return Guards(
            tuple((_split(path), name, value) for (path, name), value in self.attributes.items()),
            tuple((_split(path), self.children[path]) for path in sorted(self.children)),
            tuple((_split(path), name, f) for (path, name), f in self.methods.items()),
            tuple(entry for entry in names if not isinstance(entry[2], property)),
            tuple(entry for entry in names if isinstance(entry[2], property)),
        )


class Settings:
    """Stands for an object that a module holds: what is looked up in it is noted, no more."""

    __slots__ = ("_normswap",)

    def __init__(self, value: Any, path: str, reads: Reads) -> None:
        object.__setattr__(self, "_normswap", (value, path, reads))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance asks for."""
        return type(object.__getattribute__(self, "_normswap")[0])

    def __getattr__(self, name: str) -> Any:
        value, path, reads = object.__getattribute__(self, "_normswap")
        try:
            found = getattr(value, name)
        except AttributeError:
            reads.attributes.setdefault((path, name), MISSING)
            raise
        if callable(found) and not isinstance(found, type):
            raise TraceFailure(f"calls a method of .{path}, a {type(value).__name__} that it holds")
        return reads.attribute(path, name, found)

    def __bool__(self) -> bool:
        value = object.__getattribute__(self, "_normswap")[0]
        if hasattr(type(value), "__bool__") or hasattr(type(value), "__len__"):
            self._refuse()
        return True

    def _refuse(self, *_: Any) -> Any:
        value, path, _ = object.__getattribute__(self, "_normswap")
        raise TraceFailure(f"uses .{path}, a {type(value).__name__} that it holds")

    __setattr__ = __delattr__ = __call__ = __iter__ = __len__ = __eq__ = __hash__ = _refuse
    __getitem__ = __setitem__ = __contains__ = __str__ = __repr__ = _refuse


def _split(path: str) -> Path:
    return tuple(path.split(".")) if path else ()


def _is_comparable(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset | dict):
        parts = value.values() if isinstance(value, dict) else value
        fit = is_built_in(value) and len(value) <= _MOST_PARTS
        return fit and all(map(_is_comparable, parts))
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, type):
        return cannot_change(value)
    return is_constant(value) or isinstance(value, (*FUNCTIONS, Tensor, nn.Module))
