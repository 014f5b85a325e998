"""The context in scope: how norms that are passed no context find theirs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normswap.errors import ContextError, ConversionError, expect_module
from normswap.functional.backward import in_backward
from normswap.functional.labels import Context, Labels, resolve_labels
from normswap.graph.rows import Rows


class Scope:
    """One per converted model, shared by its containers and its norms.

    Containers that could not be traced run their own forward, and `enter` around it makes their
    context visible to the norms below. After the outermost one has left, its context stays
    readable in backward only, where checkpointing computes the forward again. Which forward that
    is cannot be seen there, so two that differ since the last backward are an error. Each thread
    has its own entries; compiled code, which cannot ask for its thread, shares `running`.
    """

    def __init__(self, num_contexts: int, names: tuple[str, ...]) -> None:
        self.num_contexts = num_contexts
        self.names = names
        self.threads = threading.local()
        self.running = 0
        self.current: Context | None = None
        self.ambient: tuple[Context, ...] = ()
        self.earlier: Context | None = None
        self.recomputed = False
        self.active = 0
        self.rows = Rows()

    def lookup(self) -> Context | None:
        """Return the context of the innermost running entry, else that of `use_context`.

        Raises:
            ContextError: a recomputation in backward that may belong to several forwards.
        """
        entries = self._entries()
        if entries and entries[-1] is not None:
            return entries[-1]
        if self.current is not None and self.running:
            return self.current
        if entries is not None and not entries and self.active and not in_backward():
            return self._of_other_thread()
        if self.current is not None and in_backward():
            self.recomputed = True
            if self.earlier is not None and not _same(self.earlier, self.current):
                raise ContextError(
                    "expected one forward before each backward where gradient checkpointing runs "
                    "inside a container that keeps its own forward (see normswap.summary), got "
                    "several with different contexts; call backward after each, use "
                    "torch.no_grad() for those without one, or turn checkpointing off there"
                )
            return self.current
        return self.ambient[-1] if self.ambient else None

    def _of_other_thread(self) -> Context | None:
        """Return the context of the entry that started this thread, if there is only one."""
        if self.active > 1 and self.current is not None:
            raise ContextError(
                "expected norms to run in the thread of the container that calls them where "
                "several run at once, got one in another thread; pass context= to it"
            )
        return self.current

    def enter(self, context: Context | None) -> Context | None:
        """Make a context current; return the one to restore, for `leave`."""
        entries = self._entries()
        outer = self.current
        outermost = not (self.running or entries)
        if outermost and torch.is_grad_enabled():
            if self.recomputed:
                self.earlier = None
            elif outer is not context:
                self.earlier = outer
            self.recomputed = False
        if entries is None:
            self.running += 1
        else:
            entries.append(context)
            self.active += outermost
        if entries is None or outermost:
            self.current = context
        return outer

    def leave(self, outer: Context | None) -> None:
        """Undo `enter`; the outermost entry's context stays, for recomputation in backward."""
        entries = self._entries()
        if entries is None:
            self.running -= 1
            nested = bool(self.running)
        else:
            entries.pop()
            self.active -= not entries
            nested = False
        if nested or not (entries or torch.is_grad_enabled()):
            self.current = outer

    def _entries(self) -> list[Context | None] | None:
        """Return the contexts of this thread's running entries; None in compiled code."""
        if torch.compiler.is_compiling():
            return None
        entries: list[Context | None] | None = getattr(self.threads, "entries", None)
        if entries is None:
            entries = self.threads.entries = []
        return entries

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave no trace of what runs inside the block."""
        before = self.current, self.earlier, self.recomputed
        try:
            yield
        finally:
            self.current, self.earlier, self.recomputed = before

    def resolve(self, labels: Labels, device: torch.device | None = None) -> Context:
        """Check labels against this model's contexts."""
        return resolve_labels(labels, self.num_contexts, self.names, device)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with nothing in scope."""
        return {"num_contexts": self.num_contexts, "names": self.names, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start anew, knowing the layouts."""
        rows = state.pop("rows")
        self.__init__(**state)  # type: ignore[misc]
        self.rows = rows


def _same(one: Context, other: Context) -> bool:
    return one.labels is other.labels or torch.equal(one.labels, other.labels)


def scopes_of(model: nn.Module) -> list[Scope]:
    """Return the scopes of the converted models that are, or are inside, a module."""
    found: dict[int, Scope] = {}
    for module in model.modules():
        scope = getattr(module, "scope", None)
        if isinstance(scope, Scope):
            found[id(scope)] = scope
    return list(found.values())


@contextmanager
def use_context(model: nn.Module, context: Labels | None) -> Iterator[None]:
    """Give every forward inside the block these labels, where it is passed none.

    For loops that cannot pass ``context=`` themselves. The model may be wrapped (compiled,
    distributed). Blocks nest; None hides the labels of an outer block.

    Args:
        model: a converted model, or a module that holds one.
        context: labels as the model's forward takes them.

    Raises:
        ConversionError: no converted model in `model`.
        ContextError: labels that do not fit.
    """
    expect_module(model)
    scopes = scopes_of(model)
    if not scopes:
        raise ConversionError(
            f"expected a converted model, got {type(model).__name__} without any context-aware "
            "norm; call normswap.convert first"
        )
    before = [scope.ambient for scope in scopes]
    if context is None:
        entered: list[tuple[Context, ...]] = [() for _ in scopes]
    else:
        device = next((p.device for p in model.parameters()), None)
        entered = [(scope.resolve(context, device),) for scope in scopes]
    try:
        for scope, ambient in zip(scopes, entered, strict=True):
            scope.ambient = ambient
        yield
    finally:
        for scope, ambient in zip(scopes, before, strict=True):
            scope.ambient = ambient
