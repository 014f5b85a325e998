"""What tracing replaces: calls of modules and reads of their attributes go to a tracer."""

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normswap.graph.code.library import is_torch
from normswap.graph.tracing.constant_calls import SWITCHES
from normswap.graph.tracing.failure import TraceFailure
from normswap.util.original_class import class_of

if TYPE_CHECKING:
    from normswap.graph.tracing.trace import TraceSession


def _replace(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute of a class until `undo` is closed."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def patch_torch(undo: ExitStack, session: "TraceSession") -> None:
    """Replace how modules are called and read, and how modes are switched, until it is undone."""
    replace = functools.partial(_replace, undo)
    for switch in (torch.autocast, torch.inference_mode):
        for name in ("__init__", "__enter__"):
            replace(switch, name, _refuse(session, vars(switch)[name], lambda *_: SWITCHES))
    original_getattr = nn.Module.__getattr__

    def getattribute(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        tracer = session.tracer
        if tracer is None:  # most reads: between traces
            return value
        asker = sys._getframe(1).f_globals.get("__name__")
        if is_torch(asker):
            return value
        if name == "__class__":  # `isinstance` asks; code that names it is refused
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

    replace(nn.Module, "__getattribute__", getattribute)
    replace(nn.Module, "__getattr__", fallback)
    for name, verb in (("__setattr__", "sets"), ("__delattr__", "deletes")):
        replace(nn.Module, name, _refuse(session, getattr(nn.Module, name), what(verb)))
    replace(nn.Module, "__call__", _call(session, nn.Module.__call__))
    for layer in session.layers:
        replace(layer, "forward", _call(session, layer.forward))


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
