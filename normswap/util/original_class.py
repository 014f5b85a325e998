"""What a converted module was, and who is told so: a model's forward and its switch of modes."""

import inspect
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Where a layer keeps what it replaced, and a converted container what it runs.
ORIGINAL = "_normswap_original"
STATE = "_normswap"
CALL = nn.Module._call_impl.__code__
# Code of methods that find norms by class to switch their mode, see `graph.questions.freezing`.
FREEZING: "weakref.WeakSet[types.CodeType]" = weakref.WeakSet()
# What asks in the place of a forward's code, which while a trace runs other threads do, too.
_BETWEEN = "normswap.graph.tracing.patches"


def container_class(module: Any) -> type:
    """Return the class that a container had before conversion; of a norm's layer, its own."""
    cls = type(module)
    return getattr(cls, "_normswap_from", cls)


def class_of(value: Any) -> type:
    """Return the class that a module had before conversion; of other values, their own."""
    original = vars(value).get(ORIGINAL) if isinstance(value, nn.Module) else None
    return container_class(value) if original is None else original.cls


def asking(frame: types.FrameType | None) -> types.FrameType | None:
    """Return the frame of the code that asks, left out what a trace in any thread puts between."""
    while frame is not None and frame.f_globals.get("__name__") == _BETWEEN:
        frame = frame.f_back
    return frame


def switches_of(base: Any) -> Iterator[str]:
    """Yield which of `train` and `eval` a class has of its own, but a training loop."""
    for verb in ("train", "eval"):
        method = getattr(base, verb)
        if method is getattr(nn.Module, verb) or not inspect.isfunction(method):
            continue
        first = next(iter([*inspect.signature(method).parameters.values()][1:]), None)
        takes_mode = first is not None and (
            first.name == "mode" or first.default is True or first.kind is first.VAR_POSITIONAL
        )
        if takes_mode or (first is None and verb == "eval"):
            yield verb


def _is_switch(frame: types.FrameType) -> bool:
    """Return whether a frame is of a model's own `train` or `eval`, which may find norms by class.

    Models keep norms in eval mode there.
    """
    code = frame.f_code
    if code.co_name not in ("train", "eval") or not code.co_argcount:
        return False
    owner = frame.f_locals.get(code.co_varnames[0])
    if not isinstance(owner, nn.Module) or code.co_name not in switches_of(type(owner)):
        return False
    own = [vars(cls)[code.co_name] for cls in type(owner).__mro__ if code.co_name in vars(cls)]
    return any(getattr(inspect.unwrap(method), "__code__", None) is code for method in own)


def in_forward(frame: types.FrameType | None) -> bool:
    """Return whether a frame is of code that a model's forward or mode runs, but of torch's own.

    Tools that exchange, fuse or synchronise norms must see what is there, a forward that branches
    on the class of a norm must see what it saw before.
    """
    frame = asking(frame)
    if frame is not None and frame.f_code in FREEZING:
        return True
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    if module == "torch._dynamo.variables.builtin":  # traces an isinstance of a forward
        return True
    if module.partition(".")[0] in ("torch", "normswap"):
        return False
    while frame is not None and frame.f_code.co_name != "forward":
        if frame.f_code is CALL or _is_switch(frame):
            break
        frame = frame.f_back
    return frame is not None


class AsBefore:
    """Mixin of layers that replace a norm: to a forward that asks, they are of the norm's class."""

    @property
    def __class__(self) -> type:
        """The class of the norm it replaced to a forward that asks, its own to all others."""
        return class_of(self) if in_forward(sys._getframe(1)) else type(self)

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)

    def _get_name(self) -> str:
        return (class_of(self) if in_forward(sys._getframe(1)) else type(self)).__name__

    def __repr__(self) -> str:
        was = (class_of(self) if in_forward(sys._getframe(1)) else type(self)).__name__
        return super().__repr__().replace(type(self).__name__, was, 1)

    def _check_input_dim(self, x: Tensor) -> None:
        getattr(class_of(self), "_check_input_dim")(self, x)  # noqa: B009 (not all norms have it)
