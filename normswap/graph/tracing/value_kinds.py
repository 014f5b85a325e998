"""The arguments of a forward: which are symbolic in its graph, which are constants of it.

A container is traced once for each *kind* of arguments it meets. Tensors and numbers are symbolic;
None, bool, str and enums are constants, since Python branches on them; tuples, lists (those of
features that DenseNet's layers take) and dicts keep their structure.
"""

import enum
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from normswap.graph.tracing.failure import TraceFailure
from normswap.util.elements import elements_of

Kind: TypeAlias = Any  # nested tuples of strings and constants: hashable, compared by value

TENSOR = "tensor"
NUMBER = "number"
OTHER = "other"

# Tuples, not unions: torch 2.9's compiler does not take isinstance of a union.
_SYMBOLIC = (Tensor, fx.Proxy)
_CONSTANTS = (str, enum.Enum)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def describe(value: object, leaves: list[object]) -> Kind:
    """Return the kind of an argument and append its symbolic parts to `leaves`.

    Args:
        value: the argument.
        leaves: collects tensors and numbers, in order.
    """
    if isinstance(value, _SYMBOLIC):
        leaves.append(value)
        return TENSOR
    if value is None:
        return None
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, _CONSTANTS):
        return (type(value), value)
    if isinstance(value, _NUMBERS):
        leaves.append(value)
        return NUMBER
    if type(value) is tuple:
        return ("tuple", tuple([describe(v, leaves) for v in value]))
    if type(value) is list:
        return ("list", tuple([describe(v, leaves) for v in value]))
    if type(value) is dict:
        return ("dict", tuple([(k, describe(v, leaves)) for k, v in value.items()]))
    return (OTHER, type(value).__name__)


def rebuild(kind: Kind, make: Callable[[Kind], Any]) -> Any:
    """Return an argument of a kind, with ``make(kind)`` for each part that `describe` appended.

    Raises:
        TraceFailure: a part that no graph can take.
    """
    if kind is None:
        return None
    if kind in (TENSOR, NUMBER):
        return make(kind)
    tag, content = kind
    if tag == OTHER:
        raise TraceFailure(f"takes a {content}, which no graph takes")
    if tag == "tuple":
        return tuple([rebuild(k, make) for k in content])
    if tag == "list":
        return [rebuild(k, make) for k in content]
    if tag == "dict":
        return {name: rebuild(k, make) for name, k in content}
    return content


def find_lists(value: object) -> Iterator[Any]:
    """Yield every list and dict that a value is or holds, outermost first."""
    if isinstance(value, (list, dict)):
        yield value
    if isinstance(value, (list, dict, tuple)):
        for part in elements_of(value):
            yield from find_lists(part)


def _parts(value: object) -> Iterator[object]:
    """Yield what a value is, or what its tuples, lists, dicts, sets and slices hold."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list | set | frozenset):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def symbolic_parts(value: object) -> list[fx.Proxy]:
    """Return the symbolic values that a value is or holds."""
    return [part for part in _parts(value) if isinstance(part, fx.Proxy)]
