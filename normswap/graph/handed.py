"""Lists and dicts that a forward is given, or hands on, and that the callee may change.

A graph takes such an argument apart, so that what its forward appends would be lost. A container
that changes one returns the new contents beside its output, and they are written back into the
caller's object; the graph of the caller reads them from there.
"""

import dis
import functools
import inspect
import types
from itertools import repeat
from typing import Any

from torch import fx, nn

from normswap.errors import ConversionError
from normswap.graph.patches import TraceFailure, is_torch
from normswap.graph.signature import EXAMPLE
from normswap.graph.values import any_leaf, describe, rebuild

# Position of an argument, and the keys its object has after the forward.
Write = tuple[int, tuple[Any, ...]]
_MUTATORS = frozenset(
    "append extend insert pop popitem remove clear update setdefault sort reverse".split()
)


def keys_of(value: Any) -> tuple[Any, ...]:
    """Return the keys of a dict or the positions of a list."""
    return tuple(value) if isinstance(value, dict) else tuple(range(len(value)))


def contents(value: Any) -> list[tuple[Any, Any]]:
    """Return the (key, value) pairs of a list or dict."""
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def snapshot_lists(values: Any) -> list[tuple[Any, list[tuple[Any, Any]]]]:
    """Return every list and dict inside some values, with its contents."""
    if isinstance(values, list | dict):
        inner = [found for _, part in contents(values) for found in snapshot_lists(part)]
        return [(values, contents(values)), *inner]
    if isinstance(values, tuple):
        return [found for part in values for found in snapshot_lists(part)]
    return []


def find_writes(values: tuple[Any, ...], before: list[Any]) -> tuple[Write, ...]:
    """Return which arguments a forward changed.

    Raises:
        TraceFailure: one inside another argument.
    """
    changed = [holder for holder, old in before if not _same(contents(holder), old)]
    writes = []
    for index, value in enumerate(values):
        if any(holder is value for holder in changed):
            writes.append((index, keys_of(value)))
    if len(writes) < len(changed):
        raise TraceFailure("changes a list or dict inside an argument it was given")
    return tuple(writes)


def write_back(target: Any, new: Any) -> None:
    """Give a list or dict new contents."""
    target.clear()
    target.extend(new) if isinstance(target, list) else target.update(new)


def hand_on(
    tracer: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[Any, fx.Proxy, Any]]]:
    """Make nodes of the lists and dicts among the arguments of a call that may change them.

    A converted child that was not traced for such arguments yet, and may change them, is taken to
    change nothing, and noted among what the trace assumed.

    Returns:
        The arguments, and (object, its node, its keys after a call that changes it, else None).
    """
    state = vars(module).get("_normswap")
    given = [v for v in (*args, *kwargs.values()) if type(v) in (list, dict)]
    given = [v for v in given if any_leaf(v, (fx.Proxy,))]
    if not given or (state is None and is_torch(type(module).__module__)):
        return args, kwargs, []
    written: dict[int, tuple[Any, ...]] = {}
    tracer.result.plain = False  # what a child does with a list depends on more than its class
    if state is not None and state.override is None:
        cls: Any = type(module)
        values = cls.bind(module, *args, **kwargs)
        variant = state.find(module, values)
        if variant is None and may_change(cls.converted_from):
            like = [rebuild(describe(v, [], True), repeat(EXAMPLE)) for v in values]
            tracer.result.assumed.append((module, tuple(like)))
            return args, kwargs, []
        if variant is not None and variant.run is not None:
            if not variant.writes:
                return args, kwargs, []
            written = {id(values[index]): keys for index, keys in variant.writes}
    nodes: dict[int, fx.Proxy] = {}
    handed = []
    for value in given:
        kind = type(value)
        parts = tuple(value) if kind is list else tuple(value.items())
        node = tracer.create_proxy("call_function", _MAKE[kind], parts, {})
        nodes[id(value)] = node
        handed.append((value, node, written.get(id(value))))
    swap = {i: nodes.get(id(v), v) for i, v in enumerate(args)}
    return tuple(swap.values()), {k: nodes.get(id(v), v) for k, v in kwargs.items()}, handed


@functools.cache
def may_change(cls: type) -> bool:
    """Return whether some method of a class contains code that changes a list or dict."""
    functions = [f for base in cls.__mro__ if not is_torch(base.__module__) for f in _codes(base)]
    return any(_changes(code) for code in functions)


def _codes(cls: type) -> list[types.CodeType]:
    found = [inspect.unwrap(getattr(f, "__func__", f)) for f in vars(cls).values() if callable(f)]
    return [f.__code__ for f in found if isinstance(f, types.FunctionType)]


def _changes(code: types.CodeType) -> bool:
    if not _MUTATORS.isdisjoint(code.co_names):
        return True
    for step in dis.get_instructions(code):
        in_place = step.opname.startswith("INPLACE") or (
            step.opname == "BINARY_OP" and step.argrepr.endswith("=")
        )
        if in_place or step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            return True
    return any(_changes(part) for part in code.co_consts if isinstance(part, types.CodeType))


def take_back(tracer: Any, module: nn.Module, handed: list[Any]) -> None:
    """After the call: read what it changed, check the rest."""
    for value, node, keys in handed:
        if keys is not None:
            parts = [(key, node[key]) for key in keys]
            write_back(value, dict(parts) if isinstance(value, dict) else [p for _, p in parts])
        else:
            what = (type(module).__name__, keys_of(value))
            tracer.create_proxy("call_function", check_unchanged, (node, *what), {})


def check_unchanged(value: Any, callee: str, keys: tuple[Any, ...]) -> None:
    """Raise where a call changed the list or dict it was given, which the graph did not expect.

    Raises:
        ConversionError: naming the call.
    """
    if keys_of(value) != tuple(keys):
        raise ConversionError(
            f"expected {callee} to leave the {type(value).__name__} it is given as it was, got "
            f"{len(value)} entries instead of {len(keys)}; the rest of this forward would not see "
            "them: let it return what it adds"
        )


def _make_list(*parts: Any) -> list[Any]:
    return list(parts)


def _make_dict(*parts: Any) -> dict[Any, Any]:
    return dict(parts)


_MAKE: dict[type, Any] = {list: _make_list, dict: _make_dict}


def _same(now: list[tuple[Any, Any]], old: list[tuple[Any, Any]]) -> bool:
    pairs = zip(now, old, strict=False)
    return len(now) == len(old) and all(a == c and b is d for (a, b), (c, d) in pairs)
