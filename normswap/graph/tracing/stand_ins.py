"""Builtins that a symbolic value, or a module that was changed, would answer wrongly."""

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from normswap.graph.tracing.bytecode import is_compared
from normswap.graph.tracing.failure import TraceFailure, is_torch
from normswap.graph.tracing.patches import stand_for
from normswap.graph.tracing.symbol import is_input
from normswap.graph.tracing.whitelist import cannot_change
from normswap.util.original_class import class_of


def symbolic_isinstance(value: Any, kinds: Any) -> bool:
    """Answer for a tensor argument."""
    if not isinstance(value, fx.Proxy):
        kinds = tuple(_flatten(kinds))
        return isinstance(value, kinds) or issubclass(class_of(value), kinds)
    if is_input(value):
        return any(issubclass(Tensor, k) for k in _flatten(kinds) if isinstance(k, type))
    raise TraceFailure("asks for the type of a value that is only known when it runs")


def symbolic_hasattr(value: Any, name: str) -> bool:
    """Answer for a tensor argument; a symbolic value has every attribute."""
    if not isinstance(value, fx.Proxy):
        _check_holder(value, name)
        found = hasattr(value, name)
        if not (found or isinstance(value, nn.Module) or cannot_change(type(value))):
            raise TraceFailure(f"asks whether a {type(value).__name__} has .{name}")
        return found
    if is_input(value) and hasattr(Tensor, name):
        return True
    raise TraceFailure(f"asks whether a value that is only known when it runs has .{name}")


def symbolic_getattr(value: Any, name: str, *default: Any) -> Any:
    """Look up an attribute; a symbolic value would never give the default."""
    if default and not symbolic_hasattr(value, name):
        return default[0]
    _check_holder(value, name)
    return getattr(value, name)


def _check_holder(value: Any, name: str) -> None:
    """Raise where what is looked up lies outside of the module, by a name only known now."""
    known = isinstance(value, types.ModuleType) and is_torch(value.__name__)
    if isinstance(value, type | types.ModuleType | types.FunctionType) and not known:
        raise TraceFailure(f"looks up .{name} of {value.__name__} by getattr or hasattr")


def symbolic_type(value: Any, *rest: Any) -> Any:
    """Answer what is compared with a type: for a converted module, the type of the original."""
    if rest:
        return type(value, *rest)
    frame = sys._getframe(1)
    if isinstance(value, fx.Proxy):
        if is_input(value):
            return Tensor
        raise TraceFailure("asks for the type of a value that is only known when it runs")
    if not is_compared(frame):
        # Attributes of the class could be read, and changed, by way of it.
        raise TraceFailure(f"looks into the type of a {type(value).__name__}")
    found = class_of(value)
    # What the forward compares it with is what stands in for int or float there.
    known = frame.f_globals if found in (int, float, bool) else {}
    return known.get(found.__name__, found)


def _flatten(kinds: Any) -> list[Any]:
    if kinds is symbolic_type:
        return [type]
    if isinstance(kinds, tuple):
        return [k for part in kinds for k in _flatten(part)]
    if isinstance(kinds, types.UnionType):
        return list(kinds.__args__)
    known = getattr(kinds, "normswap_original", None)  # int and float are replaced
    return [known if isinstance(known, type) else kinds]


STAND_INS: dict[str, Callable[..., Any]] = {
    name: stand_for(function, getattr(builtins, name))
    for name, function in (
        ("isinstance", symbolic_isinstance),
        ("hasattr", symbolic_hasattr),
        ("getattr", symbolic_getattr),
        ("type", symbolic_type),
    )
}
