"""Questions of class in forwards, read from their code.

``isinstance(self.norm, nn.BatchNorm2d)`` is answered by the layers as before, in a trace by what
stands in for `isinstance`. Nothing can answer ``type(child) is Block`` for a child that is of a
subclass now but a trace, and nothing tells `torch.compile`, which asks no object, what is among
several classes.
"""

import builtins
import dis
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from normswap.errors import ConversionError
from normswap.graph.tracing.failure import is_library
from normswap.util.looks import class_of

_ENDS = ("STORE_", "POP_TOP", "POP_JUMP", "JUMP", "RETURN", "RAISE", "FOR_ITER")
_COMPARES = ("IS_OP", "COMPARE_OP", "CONTAINS_OP")
_BUILDS = ("BUILD_TUPLE", "BINARY_OR", "BINARY_OP |")
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")


class _Expression(NamedTuple):
    """What is loaded for one statement, or part of one: values that names stand for, operations."""

    values: list[Any]
    names: set[str]
    operations: set[str]


def find_question(module: nn.Module, changed: dict[type, type]) -> str:
    """Return what a module's forward asks about the class of modules that only a trace can answer.

    Args:
        module: any.
        changed: class before conversion -> class now.
    """
    cls: Any = class_of(module)
    kinds = {k for old, new in changed.items() for k in old.__mro__ if k not in new.__mro__}
    for function in reachable(cls.forward, cls):
        expressions = list(_expressions(function))
        asks_type = any(_has(e.values, type) or "__class__" in e.names for e in expressions)
        asks_kind = any(_has(e.values, isinstance) for e in expressions)
        for values, _, operations in expressions:
            found = [c for value in values for c in _classes(value)]
            known = [c for c in found if c in changed]
            tables = any(isinstance(value, dict) for value in values)
            compares = tables or any(o.startswith(_COMPARES) for o in operations)
            if asks_type and compares and known:
                return f"{function.__qualname__} compares a type with {known[0].__name__}"
            known = [c for c in found if c in kinds]
            if asks_type and _has(values, issubclass) and known:
                return f"{function.__qualname__} compares a type with {known[0].__name__}"
            built = any(o.startswith(_BUILDS) for o in operations)
            alone = _has(values, isinstance) and not built and all(_has(values, c) for c in found)
            if asks_kind and known and not alone:
                several = f"asks whether something is of several classes, {known[0].__name__} among"
                return f"{function.__qualname__} {several} them"
    return ""


def _has(values: list[Any], value: Any) -> bool:
    # By identity: arrays and tensors answer == with what has no truth.
    return any(found is value for found in values)


def reachable(forward: Any, cls: type) -> Iterator[types.FunctionType]:
    """Yield a forward and the functions it may call: methods of its class and free functions."""
    waiting, met = [forward], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, property | classmethod | staticmethod | types.MethodType):
            value = value.fget if isinstance(value, property) else value.__func__
        known = isinstance(value, types.FunctionType) and not is_library(value.__module__)
        if not known or id(value) in met:
            continue
        met.add(id(value))
        yield value
        for values, names, _ in _expressions(value):
            waiting += values
            waiting += [
                vars(base)[name] for base in cls.__mro__ for name in names & vars(base).keys()
            ]


def _expressions(function: types.FunctionType) -> Iterator[_Expression]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        values: list[Any] = []
        names: set[str] = set()
        operations: set[str] = set()
        for step in dis.get_instructions(code):
            name, given = step.opname, step.argval
            if name.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                if values and isinstance(values[-1], types.ModuleType | type):
                    values[-1] = getattr(values[-1], given, None)
                names.add(given)
            elif name.startswith(_GLOBAL):
                known = function.__globals__
                values.append(known[given] if given in known else getattr(builtins, given, None))
            elif name.startswith("LOAD_"):
                values.append(closure.get(given) if name.startswith("LOAD_DEREF") else None)
            operations.add(f"{name} {step.argrepr}" if name == "BINARY_OP" else name)
            if name.startswith(_ENDS):
                yield _Expression(values, names, operations)
                values, names, operations = [], set(), set()


def _classes(value: Any) -> list[type]:
    """Return the classes that a value is, or holds."""
    if isinstance(value, type):
        return [value]
    if isinstance(value, tuple | list | set | frozenset | dict | types.UnionType):
        parts = value.__args__ if isinstance(value, types.UnionType) else value
        return [c for part in parts for c in _classes(part)]
    return []


def check_questions(model: nn.Module) -> None:
    """Keep with each container what its forward asks and only a trace can answer.

    Raises:
        ConversionError: a forward asks, and is not traced.
    """
    now = {module: (class_of(module), type(module)) for module in model.modules()}
    changed = {old: new for old, new in now.values() if old is not new}
    asked: dict[type, str] = {}
    for name, module in model.named_modules():
        old, _ = now[module]
        if old not in asked:
            asked[old] = find_question(module, changed)
        state: Any = vars(module).get("_normswap")
        ways = [] if state is None else state.seen()
        if state is not None:
            state.question = asked[old]
        if not ways or any(way.run is None or way.rest for way in ways):
            check_question(name, asked[old])


def check_question(name: str, question: str) -> None:
    """Raise where a forward that is not traced asks for classes.

    Raises:
        ConversionError: it does.
    """
    if question:
        raise ConversionError(
            f"expected a forward that can be traced, or asks isinstance(value, one_class) only, at "
            f"{name or 'the model'}, got one where {question}, which conversion changes; leave "
            "norms of that class, or below it, out with exclude="
        )
