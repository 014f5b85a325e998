"""What tracing replaces while it runs: names of the forward's own module, and a few of torch's."""

import builtins
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.graph.tracing.mutates import changes, gives_back
from normswap.graph.tracing.origin import is_library, is_torch
from normswap.graph.tracing.values import any_leaf, find_lists
from normswap.util.looks import class_of

_MISSING = object()
# Builtins that turn into calls in the graph when given symbolic values.
_BUILTINS = ("len", "int", "float", "max", "min", "round", "sum", "bool")


class TraceFailure(Exception):
    """A forward that no graph stands for; the container keeps its own. The text is the reason.

    Args:
        reason: why.
        methods: of the container, in one of which it came about; innermost first.
    """

    def __init__(self, reason: str, methods: Iterable[str] = ()) -> None:
        super().__init__(reason)
        self.methods = tuple(methods)


class Patches:
    """Replaces attributes and globals, and puts every one of them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace ``owner.name``, or ``owner[name]`` in a dict of globals."""
        table = owner if isinstance(owner, dict) else vars(owner)
        self._undo.append((owner, name, table.get(name, _MISSING)))
        if isinstance(owner, dict):
            owner[name] = value
        else:
            setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if isinstance(owner, dict):
                if value is _MISSING:
                    owner.pop(name, None)
                else:
                    owner[name] = value
            elif value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def globals_of(forward: Callable[..., Any], cls: Any) -> list[dict[str, Any]]:
    """Return the globals that the methods of a module class see, torch's own left out."""
    tables: dict[int, dict[str, Any]] = {}
    functions = [forward, *(f for base in cls.__mro__ for f in vars(base).values())]
    for function in functions:
        function = getattr(function, "__func__", function)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        table = getattr(function, "__globals__", None)
        if table is not None and not is_torch(table.get("__name__", "")):
            tables[id(table)] = table
    return list(tables.values())


def leaf_names(table: dict[str, Any], inline: bool) -> list[tuple[str, Any]]:
    """Return the functions among a module's globals that a graph calls instead of entering.

    Args:
        table: the globals.
        inline: whether only functions that cannot be entered are wanted.
    """
    found: list[tuple[str, Any]] = []
    for name, value in list(table.items()):
        if isinstance(value, torch.jit.ScriptFunction):
            found.append((name, value))
        elif (
            isinstance(value, types.FunctionType) and not inline and not is_torch(value.__module__)
        ):
            found.append((name, value))
    found += [(name, getattr(builtins, name)) for name in _BUILTINS if name not in table]
    return found


def wrap_leaf(
    function: Callable[..., Any],
    record: Callable[[Callable[..., Any], Any, Any], Any],
    enter: Callable[[dict[str, Any]], bool],
) -> Callable[..., Any]:
    """Return a function that records its call when an argument is symbolic.

    A call that is handed a module or a callable is entered instead, since a norm may be reached
    from there; `enter` is then told the globals it will see.
    """

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (args, kwargs)
        # The length and the truth of a list are known, whatever is in it.
        known = function in (len, bool) and not isinstance(args[0], fx.Proxy)
        if not known and any_leaf(given, (fx.Proxy,)):
            reaches = any_leaf(given, (nn.Module, types.FunctionType, types.MethodType))
            if not (reaches or any_leaf(given, (functools.partial,)) or touches(function, given)):
                return record(function, args, kwargs)
        if isinstance(function, types.FunctionType):
            enter(function.__globals__)
        return function(*args, **kwargs)

    return call


def touches(function: Any, given: Any) -> bool:
    """Return whether a function may change or give back a list or dict it is given."""
    if not isinstance(function, types.FunctionType):
        return False
    lists = [holder for value in (*given[0], *given[1].values()) for holder in find_lists(value)]
    if not any(not holder or any_leaf(holder, (fx.Proxy,)) for holder in lists):
        return False  # constants, mostly written in the call
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = code is not None and not is_library(function.__module__)
    return own and (changes(code) or gives_back(code))


def named_apply(cls: Any) -> Callable[..., Any]:
    """Return a function for a graph that applies a ``torch.autograd.Function``."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"{cls.__name__}_apply"
    return apply


def ask_user_only(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a query of a mode that torch may ask but a traced forward may not branch on."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_torch(sys._getframe(1).f_globals.get("__name__")):
            return function(*args, **kwargs)
        raise TraceFailure(f"branches on torch.{name}()")

    return call


def symbolic_isinstance(value: Any, kinds: Any) -> bool:
    """Stand in for isinstance: a tensor argument is a Tensor; other symbolic types are unknown."""
    if not isinstance(value, fx.Proxy):
        kinds = tuple(_flatten(kinds))
        return isinstance(value, kinds) or issubclass(class_of(value), kinds)
    if value.node.op == "placeholder" and value.node.meta.get("tensor"):
        return any(issubclass(Tensor, k) for k in _flatten(kinds) if isinstance(k, type))
    return _ask(value, IsInstance(_flatten(kinds)))


class IsInstance:
    """Tests the type of a value when it runs."""

    __name__ = "is_instance"
    __module__ = "normswap.graph.tracing.patches"
    pure = True

    def __init__(self, kinds: list[Any]) -> None:
        if not all(type(kind) is type for kind in kinds):
            raise TraceFailure("tests a type that is only known when it runs")
        self.kinds = tuple(kinds)

    def __call__(self, value: Any) -> bool:
        """Test it."""
        return isinstance(value, self.kinds)


def _ask(value: fx.Proxy, question: Callable[[Any], bool]) -> bool:
    if value.node.op == "placeholder":  # a number: a constant of the next attempt
        raise TraceFailure("tests the type of a value that is only known when it runs")
    return bool(value.tracer.create_proxy("call_function", question, (value,), {}))


def symbolic_hasattr(value: Any, name: str) -> bool:
    """Stand in for hasattr, which is always true of a proxy."""
    if not isinstance(value, fx.Proxy):
        return hasattr(value, name)
    if value.node.op == "placeholder" and value.node.meta.get("tensor"):
        return hasattr(Tensor, name)
    raise TraceFailure(f"asks whether a value that is only known when it runs has .{name}")


def _flatten(kinds: Any) -> list[Any]:
    if kinds is symbolic_type:
        return [type]
    if isinstance(kinds, tuple):
        return [k for part in kinds for k in _flatten(part)]
    if isinstance(kinds, types.UnionType):
        return list(kinds.__args__)
    known = getattr(kinds, "__wrapped__", None)  # int and float are replaced, see _BUILTINS
    return [known if isinstance(known, type) else kinds]


def symbolic_type(value: Any, *rest: Any) -> Any:
    """Stand in for type: a tensor argument is a Tensor; other symbolic types are unknown."""
    if not isinstance(value, fx.Proxy):
        found = type(value, *rest) if rest else class_of(value)
        # What the forward compares it with is what stands in for int or float there.
        known = sys._getframe(1).f_globals if found in (int, float, bool) else {}
        return known.get(found.__name__, found)
    if value.node.op == "placeholder" and value.node.meta.get("tensor"):
        return Tensor
    raise TraceFailure("asks for the type of a value that is only known when it runs")


def symbolic_getattr(value: Any, name: str, *default: Any) -> Any:
    """Stand in for getattr, whose default a proxy would never return."""
    if default and not symbolic_hasattr(value, name):
        return default[0]
    return getattr(value, name)


def symbolic_callable(value: Any) -> bool:
    """Stand in for callable, which is always true of a proxy."""
    if not isinstance(value, fx.Proxy):
        return callable(value)
    if value.node.op == "placeholder" and value.node.meta.get("tensor"):
        return False
    raise TraceFailure("asks whether a value that is only known when it runs is callable")


# Builtins that a symbolic value answers wrongly, and what stands in for them.
STAND_INS: dict[str, Callable[..., Any]] = {
    "isinstance": symbolic_isinstance,
    "hasattr": symbolic_hasattr,
    "getattr": symbolic_getattr,
    "callable": symbolic_callable,
    "type": symbolic_type,
}

MATH = [n for n in vars(math) if not n.startswith("_") and callable(getattr(math, n))]
