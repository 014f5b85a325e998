"""Give a container a forward that takes the context, through a subclass of its own class."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from normswap.graph.blocks.hidden import hiding
from normswap.graph.dispatch import dispatch
from normswap.graph.prepare import open_session, prepare_default
from normswap.graph.state import ContainerState
from normswap.graph.tracing import (
    any_parameters,
    declared_parameters,
    parameters_of,
    write_forward,
)


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
    module.__dict__["_normswap"] = state
    module.__class__ = _subclass(base, state.override is not None, contextual)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    cls: Any = type(module)
    state: ContainerState = module.__dict__.pop("_normswap")
    if state.override is not None:
        module.__dict__["forward"] = state.override
    module.__class__ = cls.converted_from


def _restore(
    make: Callable[..., Any], args: tuple[Any, ...], generic: bool, contextual: bool
) -> nn.Module:
    module: nn.Module = make(*args)
    module.__class__ = _subclass(type(module), generic, contextual)
    return module


def _subclass(base: Any, generic: bool, contextual: bool) -> Any:
    return converted_class(base, generic, contextual)


@functools.cache
def converted_class(base: Any, generic: bool = False, contextual: bool = True) -> Any:
    """Return the subclass of a module class whose forward ends in `dispatch`.

    Args:
        base: the class.
        generic: whether the forward takes any arguments, since it was replaced on an instance.
        contextual: whether it takes a context.
    """
    declared = [] if generic else declared_parameters(base.forward)
    parameters = any_parameters() if generic else parameters_of(base.forward)
    written = write_forward(parameters, dispatch, contextual, declared)
    for name in ("__doc__", "__annotations__"):
        if not generic and hasattr(base.forward, name):
            setattr(written.forward, name, getattr(base.forward, name))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        make, args, *rest = base.__reduce_ex__(self, protocol)
        args = tuple(base if arg is type(self) else arg for arg in args)
        return (_restore, (make, args, generic, contextual), *rest)

    def set_state(self: nn.Module, values: dict[str, Any]) -> None:
        base.__setstate__(self, values)
        state: ContainerState = self._normswap  # type: ignore[assignment]
        if any(not found for found in state.variants.values()):
            with open_session(state.layers) as session:
                prepare_default(self, session)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        # Graphs call submodules by name; a forward may branch on whether there is one.
        held = vars(self).get("_modules", ())
        base.__setattr__(self, name, value)
        if name in held or isinstance(value, nn.Module):
            state: ContainerState | None = vars(self).get("_normswap")
            if state is not None:
                state.variants.clear()

    body = {
        **hiding(base),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "__setstate__": set_state,
        "__setattr__": set_attribute,
        "forward": written.forward,
        "bind": staticmethod(written.bind),
        "spread": staticmethod(written.spread),
        "example_values": staticmethod(written.examples),
        "converted_from": base,
        "context_argument": written.argument,
        "converted_container": property(lambda self: self),
    }
    return type(base)(base.__name__, (base,), body)
