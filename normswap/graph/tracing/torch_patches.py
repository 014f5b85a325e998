"""What tracing replaces in torch: calls of modules and reads of their attributes go to a tracer."""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normswap.graph.tracing import stand_ins
from normswap.graph.tracing.bytecode import is_compared
from normswap.graph.tracing.constant_calls import SWITCHES
from normswap.graph.tracing.failure import TraceFailure, is_torch
from normswap.graph.tracing.patches import Patches, stand_for
from normswap.graph.tracing.stand_ins import symbolic_isinstance
from normswap.util.original_class import class_of

if TYPE_CHECKING:
    from normswap.graph.tracing.trace import TraceSession

_MODES = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")


def patch_torch(patches: Patches, session: "TraceSession", original: Any) -> Callable[..., Any]:
    """Replace it; return what stands for `original`, torch's checkpoint."""
    stand_in = stand_for(_refuse(session, original, lambda *_: "uses checkpoint"), original)
    patches.set(torch.utils.checkpoint, "checkpoint", stand_in)
    patches.set(torch.jit, "isinstance", symbolic_isinstance)
    patches.set(torch, "is_tensor", lambda v: symbolic_isinstance(v, Tensor))
    for name in _MODES:
        patches.set(torch, name, _ask_user_only(session, getattr(torch, name), name))
    for switch in (torch.autocast, torch.inference_mode):
        for name in ("__init__", "__enter__"):
            patches.set(switch, name, _refuse(session, vars(switch)[name], lambda *_: SWITCHES))
    _patch_modules(patches, session)
    return stand_in


def _ask_user_only(
    session: "TraceSession", function: Callable[..., Any], name: str
) -> Callable[..., Any]:
    """Return a query of a mode that torch may ask but a traced forward may not branch on."""
    # A module that is imported while a trace runs may keep the query.
    asked = weakref.ref(session)

    def call(*args: Any, **kwargs: Any) -> Any:
        traces = (session := asked()) is not None and session.tracer is not None
        if traces and not is_torch(sys._getframe(1).f_globals.get("__name__")):
            raise TraceFailure(f"asks torch.{name}(), which may change from run to run")
        return function(*args, **kwargs)

    return stand_for(call, function)


def _patch_modules(patches: Patches, session: "TraceSession") -> None:
    original_getattr = nn.Module.__getattr__

    def getattribute(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        tracer = session.tracer
        if tracer is None:  # most reads: between traces
            return value
        frame = sys._getframe(1)
        asker = frame.f_globals.get("__name__")
        if is_torch(asker) and asker != stand_ins.__name__:
            return value
        if name == "__class__" and (asker == stand_ins.__name__ or is_compared(frame)):
            return class_of(module)
        return tracer.read(module, name, value)

    def fallback(module: nn.Module, name: str) -> Any:
        try:
            value = original_getattr(module, name)
        except AttributeError:
            if session.tracer is not None:
                session.tracer.miss(module, name)
            raise
        return value if session.tracer is None else session.tracer.read(module, name, value)

    def what(verb: str) -> Callable[..., str]:
        return lambda module, name, *_: f"{verb} .{name} of {type(module).__name__} inside forward"

    patches.set(nn.Module, "__getattribute__", getattribute)
    patches.set(nn.Module, "__getattr__", fallback)
    for name, verb in (("__setattr__", "sets"), ("__delattr__", "deletes")):
        patches.set(nn.Module, name, _refuse(session, getattr(nn.Module, name), what(verb)))
    patches.set(nn.Module, "__call__", _call(session, nn.Module.__call__))
    for layer in session.layers:
        patches.set(layer, "forward", _call(session, layer.forward))


def _call(session: "TraceSession", original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.tracer is None:
            return original(module, *args, **kwargs)
        return session.tracer.call(module, args, kwargs)

    return call


def _refuse(
    session: "TraceSession", original: Callable[..., Any], why: Callable[..., str]
) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        if session.tracer is not None:
            raise TraceFailure(why(*args))
        return original(*args, **kwargs)

    return refused
