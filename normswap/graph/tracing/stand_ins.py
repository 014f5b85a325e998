"""Builtins that a symbolic value, or a module that was changed, would answer wrongly."""

import builtins
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.symbol import is_input
from normswap.util.original_class import class_of


def symbolic_isinstance(value: object, kinds: Any) -> bool:
    """Answer for a tensor argument, of which DenseNet's layers ask whether it is a list."""
    if not isinstance(value, fx.Proxy):
        return isinstance(value, kinds) or issubclass(class_of(value), kinds)
    if is_input(value):
        return issubclass(Tensor, kinds)
    raise TraceFailure("asks for the type of a value that is only known when it runs")


def _look_up(by: Callable[..., Any]) -> Callable[..., Any]:
    """Return `hasattr` or `getattr` for modules alone: the code names nothing that is compared."""

    def look_up(value: object, name: str, *default: object) -> object:
        if not isinstance(value, nn.Module):
            kind = getattr(value, "__name__", f"a {type(value).__name__}")
            raise TraceFailure(f"looks up .{name} of {kind} by {by.__name__}")
        return by(value, name, *default)

    return look_up


def stand_ins(traces: Callable[[], bool]) -> dict[str, Callable[..., Any]]:
    """Return what stands in for builtins, by name.

    Globals are those of all threads: another one that runs the same code is answered as before.

    Args:
        traces: tells whether the thread that asks is the one that traces.
    """

    def of_thread(by: Callable[..., Any]) -> Callable[..., Any]:
        stand_in = _look_up(by)
        return lambda *args: (stand_in if traces() else by)(*args)

    found: dict[str, Callable[..., Any]] = {
        "isinstance": symbolic_isinstance,
        "hasattr": of_thread(hasattr),
        "getattr": of_thread(getattr),
    }
    for name, call in found.items():
        vars(call)["normswap_original"] = getattr(builtins, name)
    return found
