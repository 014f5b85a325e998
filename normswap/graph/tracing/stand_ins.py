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
from normswap.util.original_class import asking, class_of


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
    if isinstance(value, fx.Proxy):
        if is_input(value):
            return Tensor
        raise TraceFailure("asks for the type of a value that is only known when it runs")
    if not is_compared(_code_that_asks()):
        # Attributes of the class could be read, and changed, by way of it.
        raise TraceFailure(f"looks into the type of a {type(value).__name__}")
    return _as_named(class_of(value))


def type_elsewhere(*args: Any) -> Any:
    """Answer in another thread, as `type` does."""
    return _as_named(type(*args)) if len(args) == 1 else type(*args)


def _code_that_asks() -> types.FrameType:
    frame = asking(sys._getframe(1))
    assert frame is not None
    return frame


def _as_named(found: Any) -> Any:
    """Return a class; of int, float and bool, what stands in for it where the question is asked."""
    known = _code_that_asks().f_globals if found in (int, float, bool) else {}
    return known.get(found.__name__, found)


def _flatten(kinds: Any) -> list[Any]:
    if isinstance(kinds, tuple):
        return [k for part in kinds for k in _flatten(part)]
    if isinstance(kinds, types.UnionType):
        return list(kinds.__args__)
    known = getattr(kinds, "normswap_original", None)  # int, float and type are replaced
    return [known if isinstance(known, type) else kinds]


def stand_ins(traces: Callable[[], bool]) -> dict[str, Callable[..., Any]]:
    """Return what stands in for builtins, by name.

    Globals are those of all threads: another one that runs the same code is answered as before.

    Args:
        traces: tells whether the thread that asks is the one that traces.
    """

    def of_thread(stand_in: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (stand_in if traces() else before)(*args)

    found = {
        "isinstance": symbolic_isinstance,
        "hasattr": of_thread(symbolic_hasattr, hasattr),
        "getattr": of_thread(symbolic_getattr, getattr),
        "type": of_thread(symbolic_type, type_elsewhere),
    }
    return {name: stand_for(call, getattr(builtins, name)) for name, call in found.items()}
