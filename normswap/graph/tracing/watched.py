"""Lists and dicts that a graph hands to what it does not know, checked after each call."""

import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from normswap.errors import ConversionError
from normswap.graph.tracing.origin import is_library

# A list or dict, its node, and its parts as they are handed on.
Watched = tuple[Any, fx.Proxy, list[Any]]


def keys_of(value: Any) -> tuple[Any, ...]:
    """Return the keys of a dict or the positions of a list."""
    return tuple(value) if isinstance(value, dict) else tuple(range(len(value)))


def contents(value: Any) -> list[tuple[Any, Any]]:
    """Return the (key, value) pairs of a list or dict."""
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def watch_lists(
    tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[Watched]]:
    """Make a node of every list and dict among some arguments."""
    nodes: list[Watched] = []

    def swap(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(swap(part) for part in value)
        if type(value) not in _MAKE:
            return value
        parts = [swap(part) for _, part in contents(value)]
        given = tuple(parts) if type(value) is list else tuple(zip(value, parts, strict=True))
        node = tracer.create_proxy("call_function", _MAKE[type(value)], given, {})
        nodes.append((value, node, parts))
        return node

    return tuple(swap(v) for v in args), {k: swap(v) for k, v in kwargs.items()}, nodes


def record_function(
    tracer: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Record the call of a free function."""
    nodes: list[Watched] = []
    if isinstance(function, types.FunctionType) and not is_library(function.__module__):
        args, kwargs, nodes = watch_lists(tracer, args, kwargs)
    value = tracer.create_proxy("call_function", function, args, kwargs)
    check_lists(tracer, function.__name__, nodes, None)
    return value


def check_lists(tracer: Any, callee: str, nodes: Iterable[Watched], output: Any) -> None:
    """Have the graph check that a call left these lists and dicts as they were."""
    for value, node, parts in nodes:
        what = (callee, keys_of(value), output)
        tracer.create_proxy("call_function", check_unchanged, (node, *what, *parts), {})


def check_unchanged(
    value: Any, callee: str, keys: tuple[Any, ...], output: Any, *parts: Any
) -> None:
    """Raise where a call changed or returned the list or dict it was given: the graph did not know.

    Raises:
        ConversionError: naming the call.
    """
    now = list(value.values()) if isinstance(value, dict) else value
    same = keys_of(value) == tuple(keys)
    if not same or output is value or any([a is not b for a, b in zip(now, parts)]):  # noqa: B905
        raise ConversionError(
            f"expected {callee} to leave the {type(value).__name__} it is given as it was, got it "
            f"changed, with {len(value)} entries; the rest of this forward would not see that: let "
            "it return a new one"
        )


def _make_list(*parts: Any) -> list[Any]:
    return list(parts)


def _make_dict(*parts: Any) -> dict[Any, Any]:
    return dict(parts)


def _make_ordered(*parts: Any) -> "OrderedDict[Any, Any]":
    return OrderedDict(parts)


_MAKE: dict[type, Any] = {list: _make_list, dict: _make_dict, OrderedDict: _make_ordered}
