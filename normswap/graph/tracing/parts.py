"""What a user's functions, classes and constants hold, which may change while they stay the same.

IPython's autoreload, for one, puts new code into the functions that there are.
"""

import collections
import enum
import types
from collections.abc import Iterator
from typing import Any

from normswap.graph.tracing.failure import TraceFailure, is_library
from normswap.graph.tracing.whitelist import cannot_change, is_constant

# A holder, the name of an attribute of it, and its value.
Part = tuple[Any, str, Any]
_MADE = ("_field_defaults", "_abc_impl")  # by Python, of a named tuple, of an abstract class
# What finds a field of a named tuple, or a slot: Python's, and nothing that a compiler follows.
_FIELDS = (
    type(collections.namedtuple("_Field", "field").field),  # type: ignore[attr-defined]
    types.MemberDescriptorType,
)
_METHODS = (types.FunctionType, classmethod, staticmethod, property)


def parts_of(value: Any) -> Iterator[Part]:
    """Yield what a value is made of, if it is a function or a constant of a user's class.

    Raises:
        TraceFailure: part of it may change in ways that cannot be compared.
    """
    if isinstance(value, types.FunctionType) and not is_library(value.__module__):
        yield from _parts_of_function(value)
    elif isinstance(value, list | tuple | set | frozenset | dict):
        if isinstance(value, tuple) and not cannot_change(type(value)):
            yield from parts_of_class(type(value))
        for part in value.values() if isinstance(value, dict) else value:
            yield from parts_of(part)
    elif isinstance(value, enum.Enum) and not cannot_change(type(value)):
        yield from parts_of_class(type(value))


def _parts_of_function(function: types.FunctionType) -> Iterator[Part]:
    yield function, "__code__", function.__code__
    for name in ("__defaults__", "__kwdefaults__"):
        if getattr(function, name):
            yield function, name, getattr(function, name)
    for name, part in vars(function).items():
        if name == "__wrapped__" or not name.startswith("__"):
            if not (is_constant(part) or isinstance(part, types.FunctionType)):
                raise TraceFailure(f"goes by {function.__name__}, whose .{name} may change")
            yield function, name, part
            yield from parts_of(part)


def parts_of_class(cls: type) -> Iterator[Part]:
    """Yield the attributes of a class, and what its methods are made of.

    Raises:
        TraceFailure: one of them may change in ways that cannot be compared.
    """
    members: Any = cls.__members__ if isinstance(cls, enum.EnumMeta) else {}
    for member in members.values():
        yield from ((member, name, part) for name, part in attributes_of(member))
    for base in [base for base in cls.__mro__ if not cannot_change(base)]:
        for name, raw in vars(base).items():
            method = isinstance(raw, _METHODS)
            known = name in (*_MADE, *members) or isinstance(raw, _FIELDS)
            if known or (not method and name.startswith("_") and name.endswith("_")):
                continue
            if not (method or is_constant(raw)):
                raise TraceFailure(f"makes or uses a {cls.__name__}, whose .{name} may change")
            yield cls, name, getattr(cls, name)
            function = raw.fget if isinstance(raw, property) else raw
            yield from parts_of(getattr(function, "__func__", function))


def attributes_of(member: enum.Enum) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a member of an enumeration that a user's class gives it."""
    for name, part in vars(member).items():
        if name == "_value_" or not name.startswith("_"):
            yield name, part
