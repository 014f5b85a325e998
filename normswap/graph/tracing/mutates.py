"""Read from the code of functions whether they may change, or give back, what they are given."""

import dis
import functools
import inspect
import types

from normswap.graph.tracing.origin import is_torch

_MUTATORS = frozenset(
    "append extend insert pop popitem remove clear update setdefault sort reverse".split()
)


def may_change(cls: type) -> bool:
    """Return whether some method of a class contains code that changes a list or dict."""
    functions = [f for base in cls.__mro__ if not is_torch(base.__module__) for f in _codes(base)]
    return any(changes(code) for code in functions)


def _codes(cls: type) -> list[types.CodeType]:
    found = [inspect.unwrap(getattr(f, "__func__", f)) for f in vars(cls).values() if callable(f)]
    return [f.__code__ for f in found if isinstance(f, types.FunctionType)]


@functools.lru_cache(maxsize=4096)
def changes(code: types.CodeType) -> bool:
    """Return whether a function contains code that changes a list or dict."""
    if not _MUTATORS.isdisjoint(code.co_names):
        return True
    for step in dis.get_instructions(code):
        in_place = step.opname.startswith("INPLACE") or (
            step.opname == "BINARY_OP" and step.argrepr.endswith("=")
        )
        if in_place or step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            return True
    return any(changes(part) for part in code.co_consts if isinstance(part, types.CodeType))


@functools.lru_cache(maxsize=4096)
def gives_back(code: types.CodeType) -> bool:
    """Return whether a function contains a return of one of its arguments as it is."""
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    previous: object = None
    for step in dis.get_instructions(code):
        if step.opname == "RETURN_VALUE" and previous in arguments:
            return True
        previous = step.argval if step.opname.startswith("LOAD_FAST") else None
    return False
