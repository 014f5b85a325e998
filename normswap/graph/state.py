"""What a converted container carries: the ways to run it, and when each applies."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from normswap.graph.blocks.insert import InsertedLayer
from normswap.graph.scope.scope import Scope, scope_of
from normswap.graph.tracing import NO_GUARDS, ForwardFunctions, Guards, Kind
from normswap.util.original_class import STATE

# The arguments of a forward, one for each of its parameters.
Values: TypeAlias = tuple[object, ...]


@dataclass
class Variant:
    """A way to run a container, and when it applies.

    Attributes:
        run: ``run(module, *leaves, context)``; None runs the module's own forward in scope.
        reason: why there is no graph; "" where there is one.
        guards: what of the module, and outside of it, must be as it was.
        calls: (path, class, whether `takes_arguments_as_given`) of the submodules the graph calls.
        scoped: whether it runs with the context in scope, since norms are below the module that it
            does not pass the context on to.
    """

    run: Callable[..., Any] | None
    reason: str = ""
    guards: Guards = NO_GUARDS
    calls: tuple[tuple[tuple[str, ...], type, bool], ...] = ()
    scoped: bool = False

    def holds(self, module: nn.Module) -> bool:
        """Return whether everything the trace depended on is as it was."""
        if not self.guards.hold(module):
            return False
        for path, cls, as_given in self.calls:
            child: Any = module
            for name in path:
                child = child._modules.get(name)
            if type(child) is not cls or as_given != takes_arguments_as_given(child):  # type: ignore[arg-type]
                return False
        return True


# Of a container that was converted with trace=False.
UNTRACED = Variant(None, "was converted with trace=False")


class ForwardSchedule(Protocol):
    """What a method draws once for a forward of the whole model."""

    def begin(self, device: torch.device | None = None) -> None:
        """Draw for the forward that starts now."""

    def end(self) -> None:
        """Forget the draw: the forward is over."""


@dataclass(eq=False)
class ContainerState:
    """What a converted container carries.

    Attributes:
        fqn: its qualified name in the converted model.
        scope: shared by the whole model.
        layers: classes of the norm layers.
        first_norm: name of the model's first norm, for messages.
        trace: whether it may run a graph; if not, its own forward runs with the context in scope.
        override: a forward that was set on the instance, if any.
        variants: ways to run it, by kinds of arguments.
        assumed: kinds that were traced before any call; calls may bring others.
        insertions: layers inserted in its residual blocks.
        blocks: how many of those it had when they were inserted.
        before: name of a layer its first argument passes through first, if any.
        after: name of a layer its output passes through, if any.
        schedule: begun anew by each forward, if any; it tells inserted layers what to do.
        questions: what its forward asks about classes that nothing answers, ever and in compiled
            code; "" for nothing.
    """

    fqn: str
    scope: Scope
    layers: tuple[type, ...]
    first_norm: str
    trace: bool = True
    override: Callable[..., Any] | None = None
    variants: dict[tuple[Kind, ...], list[Variant]] = field(default_factory=dict)
    assumed: set[tuple[Kind, ...]] = field(default_factory=set)
    insertions: tuple[InsertedLayer, ...] = ()
    blocks: int = 0
    before: str | None = None
    after: str | None = None
    schedule: ForwardSchedule | None = None
    questions: tuple[str, str] = ("", "")

    @property
    def runs_own_forward(self) -> bool:
        """Whether the module's own forward runs untraced, between `before` and `after`."""
        return not self.layers and not self.insertions

    def children(self) -> list[str]:
        """Return the names of the layers that were inserted in the module."""
        around = [name for name in (self.before, self.after) if name is not None]
        return [*(insertion.child for insertion in self.insertions), *around]

    def find(self, module: nn.Module, kinds: tuple[Kind, ...]) -> Variant | None:
        """Return the way to run the module on such arguments, None where none is known."""
        for variant in self.variants.get(kinds, ()):
            if variant.holds(module):
                return variant
        return None

    def seen(self) -> list[Variant]:
        """Return the variants calls have met, or the assumed ones where none were met yet."""
        if not self.trace:
            return [UNTRACED]
        met = [v for key, found in self.variants.items() if key not in self.assumed for v in found]
        return met or [v for found in self.variants.values() for v in found]

    def __getstate__(self) -> dict[str, Any]:
        """Functions do not pickle; the kinds do, and each is traced again on loading."""
        kinds: dict[tuple[Kind, ...], list[Variant]] = {
            k: [] for k, found in self.variants.items() if found
        }
        return {**self.__dict__, "variants": kinds}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContainerState":
        """Copies share the graphs, which name modules by path."""
        state = type(self).__new__(type(self))
        state.__dict__.update(self.__dict__)
        for name in ("scope", "override", "schedule"):
            setattr(state, name, copy.deepcopy(getattr(self, name), memo))
        if not self.fqn:
            state.scope.origin = None  # the whole model is copied
        state.variants = {key: list(found) for key, found in self.variants.items()}
        state.assumed = set(self.assumed)
        return state


def forward_of(module: nn.Module) -> ForwardFunctions:
    """Return the functions that were written for the forward of a converted container."""
    cls: Any = type(module)
    written: ForwardFunctions = cls._normswap_forward
    return written


# Where a converted model's root keeps what `convert` did.
RECORD = "_normswap_record"


def state_of(module: nn.Module) -> ContainerState | None:
    """Return a container's state, None where the module is not a converted container."""
    return vars(module).get(STATE)


def context_argument(module: nn.Module) -> str | None:
    """Return the name of a module's context argument, None where it takes none."""
    return getattr(type(module), "_normswap_argument", None)


def takes_context(module: nn.Module, scope: Scope) -> str | None:
    """Return the name of a module's context argument, where it takes the labels of a scope."""
    needed = needs_context(module, scope) and takes_arguments_as_given(module)
    return context_argument(module) if needed else None


def needs_context(module: nn.Module, scope: Scope) -> bool:
    """Return whether the labels of a module, passed or in scope, are those of a scope.

    A model that was converted by itself has labels of its own.
    """
    own = scope_of(module)
    foreign = own is not None and own.model is not scope.model
    return context_argument(module) is not None and not foreign


def takes_arguments_as_given(module: nn.Module) -> bool:
    """Return whether calls of a module go to its forward as they are.

    Hooks that see the keyword arguments, or a forward set on the instance, are not made for a
    context among them: it is in scope instead.
    """
    table = module.__dict__
    if "forward" in table:
        return False
    first, last = table["_forward_pre_hooks_with_kwargs"], table["_forward_hooks_with_kwargs"]
    if not (first or last):
        return True
    before, after = table["_forward_pre_hooks"], table["_forward_hooks"]
    hooks = [before[key] for key in first if key in before]
    hooks += [after[key] for key in last if key in after]
    return all([str(getattr(hook, "__module__", "")).startswith("normswap.") for hook in hooks])
