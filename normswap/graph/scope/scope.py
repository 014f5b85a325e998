"""The context in scope: how norms that are passed no context find theirs."""

import copy
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

import torch
from torch import nn

from normswap.errors import ContextError
from normswap.functional.labels import Context, Labels, is_stale, resolve_labels
from normswap.functional.recomputation import UNKNOWN, Remembered, may_run_again
from normswap.graph.rows.rows import Rows
from normswap.graph.rows.run import is_measuring
from normswap.graph.scope import messages
from normswap.graph.scope.entries import SEVERAL, Entry, Local
from normswap.graph.scope.label_watch import LabelWatch
from normswap.util.original_class import STATE

# Before that, compiled code can read what belongs to a thread, but not what belongs to a task.
_COMPILES_CONTEXTVARS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)

# The model whose forward has labels here: they are not those of a part of another model in it.
RUNNING: ContextVar["Scope | None"] = ContextVar("normswap running", default=None)

_Token: TypeAlias = Token[Entry | None]
Left: TypeAlias = tuple[Entry | None, _Token | None]
Opened: TypeAlias = tuple[Entry, tuple[Entry | None, Entry | None], _Token | None]


class Scope:
    """One per converted model, shared by its containers and its norms.

    A container whose norms cannot all be passed the context enters it here, around its forward;
    `use_context` opens it around any code. The innermost of both counts. What checkpointing
    computes again in backward finds the context of its own forward, by `find_checkpoints`.

    Attributes:
        origin: scope of the model that this one's part was copied from. The copy may take the
            part's place, as adapters do, and then finds the context of the forward that runs it.
    """

    def __init__(self, num_contexts: int, names: tuple[str, ...]) -> None:
        self.num_contexts = num_contexts
        self.names = names
        self.rows = Rows()
        self.origin: Scope | None = None
        self._restart()

    def _restart(self) -> None:
        self._local = Local()
        # Innermost last. Generators, which have no context of their own, may close any of them.
        self._open: ContextVar[tuple[Entry, ...]] = ContextVar("normswap blocks", default=())
        # What a thread that a forward starts finds, if it is given `contextvars.copy_context`.
        self._entry: ContextVar[Entry | None] = ContextVar("normswap entry", default=None)
        # With labels, in all threads; lists, since threads can change these without a lock.
        self._forwards: list[None] = []
        self._blocks: list[None] = []
        self._labelled = False
        self._checkpoints = Remembered()
        self.watch = LabelWatch()

    @property
    def model(self) -> "Scope":
        """The scope of the whole model, for that of a copied part."""
        return self if self.origin is None else self.origin.model

    @property
    def _block(self) -> Entry | None:
        """The innermost block of this task."""
        blocks = self._open.get()
        return blocks[-1] if blocks else None

    @property
    def entered(self) -> bool:
        """Whether a forward of this thread has entered the scope."""
        return self._local.here.entry is not None

    def lookup(self, whole: bool = False) -> Context | None:
        """Return the context in scope.

        Args:
            whole: whether the whole model asks, which no forward of its own can have called.

        Raises:
            ContextError: nothing tells which it is: in a thread that a labelled forward or block
                may have started, or in a recomputation in backward.
        """
        compiling = torch.compiler.is_compiling()
        entry = self._local.here.entry or self._find(compiling)
        if not compiling:
            task = torch._C._current_graph_task_id()
            if task != -1 and (entry is None or entry.task != task):
                entry = self._recall(entry, task)
            if may_run_again() and not is_measuring():
                self._checkpoints.keep(None if entry is None else entry.context)
        if entry is None:
            self._check_lost(whole)
            if compiling and not whole and torch.is_grad_enabled() and self.model._labelled:
                # Where this is a recomputation, which compiled code cannot tell, labels would get
                # lost; the same code uncompiled can.
                raise ContextError(messages.ALONE)
        return None if entry is None else entry.context

    def _find(self, compiling: bool) -> Entry | None:
        """Return the innermost entry or block where no forward of this thread is running."""
        here = self._local.here
        if here.compiled is not None:
            return here.compiled
        if not compiling:
            found = self._entry.get() or self._block
        elif _COMPILES_CONTEXTVARS:
            found = self._block
        elif here.mirror is not None and here.mirror.task == SEVERAL.task:
            raise ContextError(messages.SEVERAL_TASKS)
        else:
            found = here.mirror
        origin = self.origin
        while found is None and origin is not None:
            found, origin = origin._local.here.entry, origin.origin
        return found

    def _check_lost(self, whole: bool) -> None:
        """Raise where the labels of another thread, or of another model's forward, may be meant."""
        model = self.model
        running = None if whole or torch.compiler.is_compiling() else RUNNING.get()
        if running is not None and running.model is not model:
            raise ContextError(messages.OTHER_MODEL)
        if not whole and len(model._forwards) > model._local.here.forwards:
            raise ContextError(messages.OTHER_THREAD)
        if len(self._blocks) > self._local.here.labelled:
            raise ContextError(messages.OTHER_BLOCK)

    def _recall(self, entry: Entry | None, task: int) -> Entry | None:
        """Return the context of the forward that backward computes again here."""
        found = self._checkpoints.recall(UNKNOWN if entry is None else entry.context)
        if found is not UNKNOWN:
            if found is not None and is_stale(found.labels):
                raise ContextError(messages.STALE)
            return Entry(found, task)
        if not (self._labelled or self.model._labelled):
            return entry
        raise ContextError(messages.SEVERAL_FORWARDS)

    def enter(self, context: Context | None) -> Left:
        """Put a context in scope for a forward; return what `leave` needs."""
        here = self._local.here
        outer, here.entry = here.entry, self._make(context)
        if torch.compiler.is_compiling():
            return outer, None
        if context is not None:
            here.forwards += 1
            self._forwards.append(None)
        return outer, self._entry.set(here.entry)

    def leave(self, left: Left) -> None:
        """Undo `enter`."""
        here, (outer, token) = self._local.here, left
        entry, here.entry = here.entry, outer
        if token is None:
            return
        self._entry.reset(token)
        if entry is not None and entry.context is not None:
            here.forwards -= 1
            self._forwards.pop()

    def open(self, context: Context | None) -> Opened:
        """Put a context in scope for any code of this thread and task, for `use_context`."""
        here, entry = self._local.here, self._make(context)
        hidden = (here.entry, here.compiled)
        here.entry = None
        if torch.compiler.is_compiling():
            here.compiled = entry
            return entry, hidden, None
        here.compiled = None
        here.mirror = entry if here.mirror is self._block else SEVERAL
        here.blocks += 1
        if context is not None:
            here.labelled += 1
            self._blocks.append(None)
        self._open.set((*self._open.get(), entry))
        return entry, hidden, self._entry.set(None)

    def _make(self, context: Context | None) -> Entry:
        if context is not None:
            self._labelled = True
        compiling = torch.compiler.is_compiling()
        return Entry(context, -1 if compiling else torch._C._current_graph_task_id())

    def close(self, opened: Opened) -> bool:
        """Undo `open`; return whether the block was the innermost.

        Raises:
            ContextError: it was opened in another thread or task, where it stays open.
        """
        here, (entry, hidden, token) = self._local.here, opened
        if token is None:
            here.entry, here.compiled = hidden
            return True
        blocks = self._open.get()
        if not any(block is entry for block in blocks):
            raise ContextError(messages.NOT_CLOSED)
        here.entry, here.compiled = hidden
        if entry.context is not None:
            here.labelled -= 1
            self._blocks.pop()
        self._open.set(tuple(block for block in blocks if block is not entry))
        self._entry.reset(token)
        here.blocks -= 1
        if not here.blocks:
            here.mirror = None
        elif here.mirror is entry:
            here.mirror = self._block
        return entry is blocks[-1]

    def resolve(self, labels: Labels, device: torch.device | None = None) -> Context:
        """Check labels against this model's contexts."""
        return resolve_labels(labels, self.num_contexts, self.names, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scope":
        """Start with nothing in scope, knowing the layouts; see `origin`."""
        new = Scope(self.num_contexts, self.names)
        memo[id(self)] = new
        new.rows = copy.deepcopy(self.rows, memo)
        new.watch = self.watch  # labels of a model that trains are missed in its EMA copy, too
        new.origin = self if self.origin is None else copy.deepcopy(self.origin, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Keep what is no part of a run."""
        return {name: self.__dict__[name] for name in ("num_contexts", "names", "rows", "origin")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start anew."""
        self.__dict__.update(state)
        self._restart()


def scope_of(module: nn.Module) -> Scope | None:
    """Return the scope of a norm or a converted container; None of any other module."""
    state = vars(module).get(STATE)
    scope = getattr(module, "scope", None) if state is None else state.scope
    return scope if isinstance(scope, Scope) else None
