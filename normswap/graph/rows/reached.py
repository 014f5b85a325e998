"""What a value leads to that a forward may change by way of it."""

import functools
import sys
import types
import weakref
from array import array
from typing import Any

from normswap.graph.code.library import is_library
from normswap.graph.code.uses import is_written

_MOST_BYTES = 1 << 24
# Modules of Python with classes of plain objects.
_NAMESPACES = ("types", "argparse", "collections", "queue", "_thread", "weakref", "_weakrefset")


def behind(value: Any) -> list[Any] | None:
    """Return what a method, partial function, property or weak reference leads to; else None."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, classmethod | staticmethod):
        return [value.__func__]
    if isinstance(value, functools.cached_property | functools.partialmethod):
        return [value.func]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, weakref.ref):
        return [value()]
    return [value.__self__] if isinstance(value, types.BuiltinMethodType) else None


def function_of(hook: object) -> types.FunctionType | None:
    """Return the Python function that a callable runs, None for code written in C."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not isinstance(hook, types.FunctionType | types.MethodType):
        hook = type(hook).__call__
    function = getattr(hook, "__func__", hook)
    return function if isinstance(function, types.FunctionType) else None


def whole_of(value: Any) -> Any:
    """Return the index of all of an array that can change, of NumPy or of bytes; None of others."""
    if isinstance(value, bytearray | array):
        return slice(None) if len(value) < _MOST_BYTES else None
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    return ... if value.flags.writeable and value.nbytes < _MOST_BYTES else None


def is_of_library(value: object) -> bool:
    """Return whether a class, function or object is none of the user's, as a logger or queue."""
    module = getattr(value, "__module__", None)
    return is_library(module) and module not in _NAMESPACES


def names_in(code: types.CodeType) -> set[str]:
    """Return the globals and attributes that code names, and the functions in it."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(filter(is_written, code.co_names)).union(*map(names_in, inner))
