"""Give a container a forward that takes the context, through a subclass of its own class."""

import abc
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from normswap.graph.blocks.hidden import hiding
from normswap.graph.dispatch import calling, dispatch
from normswap.graph.other_tools import refusals
from normswap.graph.prepare import prepare_default
from normswap.graph.questions.freezing import learn_freezing
from normswap.graph.state import ContainerState, state_of
from normswap.graph.tracing import (
    TraceSession,
    any_parameters,
    free_argument,
    parameters_of,
    write_forward,
)
from normswap.util.original_class import STATE, in_forward


def install(module: nn.Module, state: ContainerState, contextual: bool = True) -> None:
    """Make a module a converted container: same object, a subclass of its class.

    Args:
        module: the container.
        state: what it carries from now on.
        contextual: whether its forward takes a context; without, its signature stays.
    """
    base = type(module)
    if "forward" in vars(module):
        state.override = vars(module).pop("forward")
    argument = free_argument(module, state.override) if contextual else None
    module.__dict__[STATE] = state
    _set_class(module, converted_class(base, state.override is not None, argument))


def _set_class(module: nn.Module, cls: type) -> None:
    # Past the module's own `__setattr__`, which may refuse.
    object.__setattr__(module, "__class__", cls)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    cls: Any = type(module)
    state: ContainerState = module.__dict__.pop(STATE)
    if state.override is not None:
        module.__dict__["forward"] = state.override
    _set_class(module, cls._normswap_from)


def _restore(make: Callable[..., Any], args: tuple[Any, ...], *kind: Any) -> nn.Module:
    module: nn.Module = make(*args)
    _set_class(module, converted_class(type(module), *kind))
    return module


def converted_class(
    base: Any, generic: bool = False, argument: str | None = "context", replaced: bool = False
) -> Any:
    """Return the subclass of a module class whose forward ends in `dispatch`.

    There is one for each kind while something is of it; its base knows it as long, and no longer.

    Args:
        base: the class.
        generic: whether the forward takes any arguments, since it was replaced on an instance.
        argument: name of its context argument; None where it takes no context.
        replaced: whether a forward that takes no context was set on the instance since.
    """
    kind = (generic, argument, replaced)
    alive = (cls for cls in type.__subclasses__(base) if vars(cls).get("_normswap_kind") == kind)
    return next(alive, None) or _make_class(base, *kind)


def _quiet(base: Any) -> Any:
    """Return what stands before a class while a subclass is made of it: its hook does not run.

    To be taken away again it has to be laid out in memory as the class, which begins with ABC or
    Generic in some models (pykeen).
    """
    while base.__dictoffset__:
        base = base.__base__
    body = {"__init_subclass__": classmethod(lambda cls, **given: None), "__orig_bases__": ()}
    return type.__new__(type(base), "quiet", (base,), body)


class _Forwarding(type):
    """What a model's own code sets on ``type(self)`` it sets on the class of the original, as ever.

    What others set there, as profilers and mocks do, is theirs to take back: it stays on this
    class, as do what conversion made and what is set on a subclass that someone makes of it.
    """

    def __setattr__(cls, name: str, value: object) -> None:
        if cls._keeps(name, sys._getframe(1)):
            super().__setattr__(name, value)
        else:
            setattr(vars(cls)["_normswap_from"], name, value)
        argument = vars(cls).get("_normswap_argument")
        if name == "forward" and argument is not None and not _takes(value, argument):
            base: Any = vars(cls)["_normswap_from"]
            super().__setattr__("__call__", calling(base.__call__, argument))

    def __delattr__(cls, name: str) -> None:
        made: dict[str, object] = vars(cls).get("_normswap_made", {})
        if name in made:
            super().__setattr__(name, made[name])
        elif cls._keeps(name, sys._getframe(1)):
            super().__delattr__(name)
        else:
            delattr(vars(cls)["_normswap_from"], name)

    def _keeps(cls, name: str, frame: types.FrameType) -> bool:
        """Return whether this class itself is meant by code that sets or deletes a name of it."""
        if "_normswap_from" not in vars(cls) or name in vars(cls):
            return True
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        return not (in_forward(frame) or cls in (first, *type(first).__mro__))


class _ForwardingABCMeta(_Forwarding, abc.ABCMeta):
    """Lets an abstract base stand beside a converted class, as `higher` has it."""


def _subclass(base: Any, body: dict[str, Any]) -> Any:
    """Make a subclass as the class statement does, without the hooks of the base.

    Neither ``__init_subclass__`` nor the metaclass runs: many of them register what they see.
    """
    own = type(base)
    kind: Any = _ForwardingABCMeta
    if own not in (type, abc.ABCMeta):
        kind = type(own.__name__, (_Forwarding, own), {})
    cls: Any = type.__new__(kind, base.__name__, (_quiet(base), base), body)
    if isinstance(cls, abc.ABCMeta):
        abc._abc_init(cls)  # type: ignore[attr-defined]  # else it shares the caches of its base
    type.__setattr__(cls, "__bases__", (base,))
    type.__setattr__(cls, "_normswap_from", base)
    type.__setattr__(cls, "_normswap_made", body)
    return cls


def _takes(function: Any, argument: str) -> bool:
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins tell no signature
        return False


def _make_class(base: Any, generic: bool, argument: str | None, replaced: bool) -> Any:
    declared = [] if generic else parameters_of(base.forward, follow_wrapped=True)
    parameters = any_parameters() if generic else parameters_of(base.forward)
    written = write_forward(parameters, dispatch, argument, declared)
    for name in ("__doc__", "__annotations__"):
        if not generic and hasattr(base.forward, name):
            setattr(written.forward, name, getattr(base.forward, name))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        make, args, *rest = base.__reduce_ex__(self, protocol)
        args = tuple(base if arg is type(self) else arg for arg in args)
        return (_restore, (make, args, generic, argument, replaced), *rest)

    def set_state(self: nn.Module, values: dict[str, Any]) -> None:
        base.__setstate__(self, values)
        state: ContainerState = vars(self)[STATE]
        if any(not found for found in state.variants.values()):
            with TraceSession(state.layers) as session:
                prepare_default(self, session)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        # Graphs call submodules by name; a forward may branch on whether there is one.
        children = vars(self).get("_modules", ())
        base.__setattr__(self, name, value)
        state = state_of(self)
        if name == "forward" and state is not None:
            state.scope.rows.forget()
        if name == "forward" and argument is not None:
            _set_class(self, converted_class(base, generic, argument, not _takes(value, argument)))
        if state is not None and (name in children or isinstance(value, nn.Module)):
            state.variants.clear()

    body = {
        **hiding(base),
        **refusals(base),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "__setstate__": set_state,
        "__setattr__": set_attribute,
        "forward": written.forward,
        "_normswap_forward": written,
        "_normswap_kind": (generic, argument, replaced),
        "_normswap_argument": argument,
        # As a property, which is another function on a module than on its class.
        "_normswap_bound": not inspect.isfunction(inspect.getattr_static(base, "forward")),
    }
    if replaced or base.__call__ is not nn.Module.__call__:
        body["__call__"] = calling(base.__call__, argument)
    learn_freezing(base)
    return _subclass(base, body)
