"""Trace one container's forward, one level deep: every submodule and free function is a call.

What a graph would silently freeze is refused or guarded: attributes the forward read are recorded
with their values (`Traced.reads`); writing attributes, Python randomness, switching gradient or
autocast modes, checkpointing, tensors made elsewhere raise `TraceFailure`. Tensor functions of
constants (``torch.zeros(...)``) become calls, so that nothing is computed while tracing.
"""

import functools
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.graph.tracing import patches as p
from normswap.graph.tracing.branches import end_at_question
from normswap.graph.tracing.handed import Effects, find_effects, snapshot_lists
from normswap.graph.tracing.hazards import Watch
from normswap.graph.tracing.held import DRAWS, put_back, random_states
from normswap.graph.tracing.known import Known
from normswap.graph.tracing.live import SWITCHES, LiveCalls
from normswap.graph.tracing.origin import is_library, is_torch
from normswap.graph.tracing.patches import Patches, TraceFailure
from normswap.graph.tracing.region import trace_checkpointed
from normswap.graph.tracing.tracer import ContainerTracer, Traced
from normswap.graph.tracing.values import TENSOR, Kind, any_leaf, leaf_kinds, rebuild
from normswap.graph.tracing.watched import record_function
from normswap.util.looks import class_of

_LOCK = threading.RLock()
_OPEN: list["TraceSession"] = []
_CHECKPOINT = torch.utils.checkpoint.checkpoint


def tracing() -> bool:
    """Return whether this call happens inside a trace."""
    return bool(_OPEN) and _OPEN[-1].tracer is not None


class TraceSession:
    """Traces containers; while it is open, module calls and reads go through the tracer.

    Args:
        layers: classes of the norm layers, whose forward called by itself counts as a call.
    """

    def __init__(self, layers: tuple[Any, ...] = ()) -> None:
        self.layers = layers
        self.outlined: dict[type, tuple[str, ...]] = {}  # methods that no graph stands for
        self.assumed: list[tuple[nn.Module, tuple[Any, ...]]] = []  # of callees, by recent traces
        self.probed: dict[Any, Effects | None] = {}  # what callees do to lists they are given
        self._tracer: ContainerTracer | None = None
        self._thread = threading.get_ident()
        self._patches = Patches()
        self._local = Patches()
        self._tables: dict[tuple[int, bool], list[tuple[str, Any]]] = {}
        self._entered: set[int] = set()
        self._library: set[int] = set()
        self._inline = False
        self.known = Known()

    @property
    def tracer(self) -> ContainerTracer | None:
        """The tracer of the trace under way; None in other threads, which run as usual."""
        return self._tracer if threading.get_ident() == self._thread else None

    def __enter__(self) -> "TraceSession":
        _LOCK.acquire()
        _OPEN.append(self)
        original_call, original_getattr = nn.Module.__call__, nn.Module.__getattr__

        @functools.wraps(original_call)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.tracer is None:
                return original_call(module, *args, **kwargs)
            return self.tracer.call(module, args, kwargs)

        def getattribute(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if self.tracer is None or is_torch(sys._getframe(1).f_globals.get("__name__")):
                return value
            if name == "__class__":
                return class_of(module)
            return self.tracer.read(module, name, value)

        def fallback(module: nn.Module, name: str) -> Any:
            value = original_getattr(module, name)
            if self.tracer is None:
                return value
            return self.tracer.read(module, name, value)

        def setattribute(module: nn.Module, name: str, value: Any) -> None:
            if self.tracer is not None:
                raise TraceFailure(f"sets .{name} of {type(module).__name__} inside forward")
            original_setattr(module, name, value)

        original_setattr = nn.Module.__setattr__
        apply = vars(torch.autograd.Function)["apply"]

        def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if self.tracer is None or not any_leaf((args, kwargs), (fx.Proxy,)):
                return apply.__get__(None, cls)(*args, **kwargs)
            return self.tracer.create_proxy("call_function", p.named_apply(cls), args, kwargs)

        self._patches.set(nn.Module, "__call__", call)
        self._patches.set(nn.Module, "__getattribute__", getattribute)
        self._patches.set(nn.Module, "__getattr__", fallback)
        self._patches.set(nn.Module, "__setattr__", setattribute)
        self._patches.set(torch.autograd.Function, "apply", classmethod(apply_function))
        self._patches.set(torch.utils.checkpoint, "checkpoint", self._checkpoint)
        self._patches.set(torch.jit, "isinstance", p.symbolic_isinstance)
        for switch in (torch.autocast, torch.inference_mode):
            self._patches.set(switch, "__enter__", self._refuse_switch(vars(switch)["__enter__"]))
        self._patches.set(torch, "is_tensor", lambda v: p.symbolic_isinstance(v, Tensor))
        for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"):
            self._patches.set(torch, name, p.ask_user_only(getattr(torch, name), name))
        for name in p.MATH:
            wrapped = p.wrap_leaf(getattr(math, name), self._record, self._enter_globals)
            self._patches.set(math, name, wrapped)
        for layer in self.layers:
            self._patches.set(layer, "forward", self._layer_forward(layer.forward))
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.undo()
        _OPEN.pop()
        _LOCK.release()

    def _layer_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.tracer is None:
                return original(module, *args, **kwargs)
            return self.tracer.call(module, args, kwargs)

        return forward

    def _refuse_switch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def enter(switch: Any) -> Any:
            if self.tracer is not None:
                raise TraceFailure(SWITCHES)
            return original(switch)

        return enter

    def _record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self.tracer is not None
        return record_function(self.tracer, function, args, kwargs)

    def _checkpoint(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.tracer is None:
            return _CHECKPOINT(function, *args, **kwargs)
        return trace_checkpointed(self.tracer, function, args, kwargs)

    def _enter_globals(self, table: dict[str, Any]) -> bool:
        """Replace the free functions a function in these globals may call.

        Returns:
            Whether they may be those of a forward: not torch's or the standard library's.
        """
        key = id(table)
        if key in self._library:
            return False
        if key in self._entered:
            return True
        if self.tracer is None:
            return False
        if is_library(table.get("__name__")):
            self._library.add(key)
            return False
        self._entered.add(key)
        leaves = (key, self._inline)
        if leaves not in self._tables:
            self._tables[leaves] = [
                (name, p.wrap_leaf(function, self._record, self._enter_globals))
                for name, function in p.leaf_names(table, self._inline)
            ]
        for name, wrapped in self._tables[leaves]:
            self._local.set(table, name, wrapped)
        for name, value in list(table.items()):
            if value is _CHECKPOINT:
                self._local.set(table, name, self._checkpoint)
        for name, stand_in in p.STAND_INS.items():
            if name not in table:
                self._local.set(table, name, stand_in)
        return True

    def trace(
        self,
        root: nn.Module,
        forward: Callable[..., Any],
        call: Callable[..., Any],
        kinds: tuple[Kind, ...],
        inline: bool = False,
        answers: tuple[bool, ...] = (),
        outlined: tuple[str, ...] = (),
    ) -> Traced:
        """Trace one path of a forward.

        Args:
            root: the container.
            forward: its own class's forward.
            call: ``call(forward, root, values)`` spreads values over the signature.
            kinds: of the arguments, in the order of the signature.
            inline: whether to enter free functions, where they are not calls in the graph.
            answers: to the first questions whether a symbolic value is true.
            outlined: names of methods of the container that are calls in the graph.

        Returns:
            The graph; with a failure, one that ends at its last question, after which the
            module's own forward may be run from its start instead.

        Raises:
            TraceFailure: no graph stands for this forward; the text says why.
        """
        names = self.known.names_of(root)
        tracer = ContainerTracer(root, names, answers, outlined, self.probed)
        leaves: list[Any] = []
        for number, leaf in enumerate(k for kind in kinds for k in leaf_kinds(kind)):
            proxy = tracer.create_proxy("placeholder", f"input_{number}", (), {})
            proxy.node.meta["tensor"] = leaf == TENSOR
            leaves.append(proxy)
        supply: Iterator[Any] = iter(leaves)
        values = tuple(rebuild(kind, supply) for kind in kinds)
        before, lists = random_states(), snapshot_lists(values)
        self._inline, self._entered = inline, set()
        watch = Watch(self._enter_globals, tracer.held.names, root)
        cls: Any = type(root)
        failure: Exception | None = None
        try:
            self._tracer = tracer
            for table in p.globals_of(forward, cls):
                self._enter_globals(table)
            with LiveCalls(tracer), watch:
                output = call(forward, root, values)
                effects, output = find_effects(values, lists, output)
                tracer.result.effects = effects
                if effects.writes:
                    output = (output, tuple(values[i] for i, _ in effects.writes))
                tracer.create_node("output", "output", (tracer.create_arg(output),), {})
                tracer.check_last()
        except Exception as error:
            failure = error
        finally:
            self._tracer = None
            self._local.undo()
            drawn = random_states() != before
            if drawn:
                random.setstate(before[0])
            self.assumed += tracer.result.assumed
            changed = put_back(tracer.root, tracer.result.reads, tracer.held)
        tracer.result.reads.update(tracer.held.settings())
        tracer.result.plain &= not tracer.held.objects
        if failure is not None:
            end_at_question(tracer, failure)
        elif drawn:
            raise TraceFailure(DRAWS, watch.methods_naming("random", "np", "numpy"))
        elif changed:
            name = changed.partition(".")[0]
            raise TraceFailure(f"changes .{changed} inside forward", watch.methods_naming(name))
        return tracer.result
