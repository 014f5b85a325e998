"""Questions of class in forwards, read from their code.

``isinstance(self.norm, nn.BatchNorm2d)`` is answered by the layers as before, in a trace by what
stands in for `isinstance`. Nothing can answer ``type(child) is Block`` for a child that is of a
subclass now. Whether a norm is of several classes layers answer, too, but nothing tells
`torch.compile`, which asks no object then, and from torch 2.15 on for one class neither.
"""

import builtins
import operator
import types
from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from normswap.graph.code.bytecode import Statement, closure_of, codes_of, read_code
from normswap.graph.code.class_names import ways_to_names
from normswap.graph.code.library import is_library
from normswap.graph.code.uses import COMPARES
from normswap.util.elements import COLLECTIONS, elements_of
from normswap.util.original_class import class_of

_BUILDS = {"BUILD_TUPLE", "BINARY_OR", "|"}
# By which a class is put into a table, or looked up in one, to be found there by its type.
_TABLES = {"BUILD_TUPLE", "BUILD_LIST", "BUILD_SET", "BUILD_MAP", "BINARY_SUBSCR", "[]"}
_LOOKS_UP = {"get", "setdefault", "pop", "index", "count"}
_COMPARING = (operator.is_, operator.is_not, operator.eq, operator.ne, operator.contains)
# From torch 2.15 on the compiler asks a module's own class, and no longer the module.
_COMPILER_ASKS = torch.__version__ < "2.15.0a0"


class Question(NamedTuple):
    """What a forward asks, of which class.

    Attributes:
        exact: whether of that class alone, not of those below.
        compiled: whether it gets its answer except in compiled code.
    """

    text: str
    cls: type
    exact: bool = True
    compiled: bool = False

    def means(self, cls: type) -> bool:
        """Return whether it is asked of a class."""
        return cls is self.cls or (not self.exact and issubclass(cls, self.cls))


def find_questions(
    module: nn.Module, changed: dict[type, type], method: str | types.FunctionType = "forward"
) -> Iterator[Question]:
    """Yield what a module's forward asks about the class of modules that nothing answers.

    `changed` gives the class now of each class before conversion; `method` is another one to
    read, or a function, as a hook.
    """
    cls: Any = class_of(module)
    kinds = {k for old, new in changed.items() for k in old.__mro__ if k not in new.__mro__}
    renamed = [old for old, new in changed.items() if old.__name__ != new.__name__]
    functions = list(reachable(cls, method, vars(module)))
    said = [part for function in functions for part in _statements(function)]
    asks_type = any(_has(values, type) or "__class__" in s.attributes for values, s in said)
    for function in functions:
        codes = codes_of(function.__code__) if renamed and _is_of(function, cls) else ()
        named = {way for code in codes for way in ways_to_names(code)}
        for way in sorted(named):
            # `__class__` is answered as before, but not by what the compiler sees.
            text = f"{function.__qualname__} goes by the name of a class ({way})"
            yield from (Question(text, c, compiled=way == "__class__") for c in renamed)
        parts = list(_statements(function))
        asks_kind = any(_has(values, isinstance) for values, _ in parts)
        for values, (_, attributes, operations) in parts:
            held = [_held(module, name) for name in attributes]
            values = [*values, *(value for value in held if value is not None)]
            found = [c for value in values for c in _classes(value)]
            exact = [c for c in found if c in changed]
            below = [c for c in found if c in kinds]
            looks_up = attributes & _LOOKS_UP or any(isinstance(v, dict) for v in values)
            in_table = operations & _TABLES and not _has(values, isinstance)
            compares = operations & COMPARES or any(_has(values, f) for f in _COMPARING)
            if not (compares or looks_up or in_table):
                exact = []
            asked = exact or (below if _has(values, issubclass) else [])
            if asks_type and asked:
                text = f"{function.__qualname__} compares a type with {asked[0].__name__}"
                yield from (Question(text, c, asked is exact) for c in asked)
            built = operations & _BUILDS
            alone = _has(values, isinstance) and not built and all(_has(values, c) for c in found)
            asks = asks_kind or "MATCH_CLASS" in operations
            if asks and below and not ((alone or not asks_kind) and _COMPILER_ASKS):
                several = f"of several classes, {below[0].__name__} among them"
                what = (
                    f"a {below[0].__name__}, which compiled code sees none of" if alone else several
                )
                text = f"{function.__qualname__} asks whether something is {what}"
                yield from (Question(text, c, exact=False, compiled=True) for c in below)


def _held(module: nn.Module, name: str) -> Any:
    """Return the class or collection that a module, or its class, has under a name, or None."""
    if name[:2] == "__":  # what every class has, as its __mro__
        return None
    found = vars(module).get(name, getattr(class_of(module), name, None))
    return found if isinstance(found, (*COLLECTIONS, type)) else None


def _is_of(function: types.FunctionType, cls: type) -> bool:
    """Return whether a function is of the packages of a model, or of none that is installed.

    Others that a forward calls go by names of classes in what they print, not of norms.
    """
    package, *_ = _home_of(function).split(".")
    own = any(package == base.__module__.partition(".")[0] for base in cls.__mro__)
    return own or "-packages" not in function.__code__.co_filename


def _home_of(function: types.FunctionType) -> str:
    """Return the module of the code of a function; a wrapper bears that of what it wraps."""
    return str(function.__globals__.get("__name__"))


def _has(values: list[object], value: object) -> bool:
    # By identity: arrays and tensors answer == with what has no truth.
    return any(found is value for found in values)


def reachable(
    cls: type,
    method: str | types.FunctionType = "forward",
    held: Mapping[str, object] | None = None,
) -> Iterator[types.FunctionType]:
    """Yield a class's forward and the functions it may call: its methods and free functions.

    So are those among the attributes `held` of a module. A scripted module's class has no forward.
    """
    waiting: list[object] = [getattr(cls, method, None) if isinstance(method, str) else method]
    met = set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, property | classmethod | staticmethod | types.MethodType):
            value = value.fget if isinstance(value, property) else value.__func__
        if not isinstance(value, types.FunctionType) or id(value) in met:
            continue
        if is_library(_home_of(value)):
            # As `torch.compiler.disable` makes one.
            waiting.append(getattr(value, "__wrapped__", None))
            continue
        met.add(id(value))
        yield value
        for values, statement in _statements(value):
            waiting += values
            waiting += [held[n] for n in statement.attributes & held.keys()] if held else []
            for base in cls.__mro__:
                waiting += [vars(base)[n] for n in statement.attributes & vars(base).keys()]


def _statements(function: types.FunctionType) -> Iterator[tuple[list[object], Statement]]:
    """Yield the statements of a function, with what the names that each loads stand for."""
    names = ChainMap(function.__globals__, vars(builtins))
    closure = closure_of(function)
    for code in codes_of(function.__code__):
        for statement in read_code(code).statements:
            values = []
            for load in statement.loads:
                value = (closure if load.free else names).get(load.name)
                for name in load.chain:
                    if isinstance(value, types.ModuleType | type):
                        value = getattr(value, name, None)
                values.append(value)
            yield values, statement


def _classes(value: object, depth: int = 4) -> Iterator[type]:
    """Yield the classes that a value is, or holds, not too deep: a list may hold itself."""
    if isinstance(value, type):
        yield value
    elif isinstance(value, (*COLLECTIONS, types.UnionType)) and depth:
        whole = value.__args__ if isinstance(value, types.UnionType) else value
        parts = dict.keys(whole) if isinstance(whole, dict) else elements_of(whole)
        for part in parts:
            yield from _classes(part, depth - 1)
