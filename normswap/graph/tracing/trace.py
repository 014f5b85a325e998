"""Trace one container's forward, one level deep: every submodule is a call.

A graph stands for a forward only if all that the forward did while it was traced is known to be
repeatable: see `whitelist` for what it may read, `reads` for what is compared before each run,
`watch` for how the rest is kept from running. Anything else raises `TraceFailure`, with nothing
outside of the trace changed.
"""

import gc
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import fx, nn

from normswap.graph.tracing.constant_calls import ConstantCalls
from normswap.graph.tracing.failure import TraceFailure, in_words
from normswap.graph.tracing.list_effects import check_given, snapshot_lists
from normswap.graph.tracing.patches import patch_torch
from normswap.graph.tracing.reads import Guards
from normswap.graph.tracing.tracer import ContainerTracer
from normswap.graph.tracing.value_kinds import TENSOR, Kind, rebuild
from normswap.graph.tracing.watch import Watch
from normswap.util.original_class import container_class

_LOCK = threading.RLock()
_OPEN: list["TraceSession"] = []


def tracing() -> bool:
    """Return whether this call happens inside a trace."""
    return bool(_OPEN) and _OPEN[-1].tracer is not None


# What a forward reads and asks is found in its bytecode, which differs by version; a version stands
# here once the tests of graphs have passed on it (tests/README.md says which ran). On others every
# forward is its own.
PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13), (3, 14))


class Traced(NamedTuple):
    """A forward as a graph.

    Attributes:
        graph: its placeholders are the symbolic parts of the arguments, in order.
        guards: what must still hold for it to stand for the forward.
    """

    graph: fx.Graph
    guards: Guards


class TraceSession:
    """Traces containers; while it is open, module calls and reads go through the tracer.

    Args:
        layers: classes of the norm layers, whose forward called by itself counts as a call.

    Attributes:
        made: what was made of containers, by class, arguments and structure: blocks are alike.
    """

    def __init__(self, layers: tuple[type[nn.Module], ...] = ()) -> None:
        self.layers = layers
        self.made: dict[Hashable, list[Any]] = {}
        self._tracer: ContainerTracer | None = None
        self._thread = threading.get_ident()
        self._patches = ExitStack()

    @property
    def tracer(self) -> ContainerTracer | None:
        """The tracer of the trace under way; None in other threads, which run as usual."""
        found = self._tracer
        return None if found is None or threading.get_ident() != self._thread else found

    def __enter__(self) -> "TraceSession":
        _LOCK.acquire()
        _OPEN.append(self)
        patch_torch(self._patches, self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.close()
        _OPEN.pop()
        _LOCK.release()

    def trace(self, root: nn.Module, call: Callable[..., Any], kinds: tuple[Kind, ...]) -> Traced:
        """Trace a container's forward.

        Args:
            root: the container.
            call: ``call(forward, root, values)`` spreads values over the signature.
            kinds: of the arguments, in the order of the signature.

        Raises:
            TraceFailure: no graph stands for this forward; the text says why.
        """
        if sys.version_info[:2] not in PYTHONS:
            version = ".".join(map(str, sys.version_info[:2]))
            raise TraceFailure(f"is compiled by Python {version}, whose bytecode is not read")
        cls: Any = container_class(root)
        if inspect.iscoroutinefunction(cls.forward):
            raise TraceFailure("is async")
        tracer = ContainerTracer(root)
        values = _place(kinds, tracer)
        lists = snapshot_lists(values)
        self._tracer = tracer
        # The collector runs code of others in the middle of a forward, which is not judged.
        collecting = gc.isenabled()
        gc.disable()
        try:
            tracer.reads.name(cls, "forward", cls.forward)
            with ConstantCalls(), Watch(tracer.reads):
                output = call(cls.forward, root, values)
                check_given(lists, output)
                tracer.create_node("output", "output", (tracer.create_arg(output),), {})
        except Exception as error:
            self._tracer = None  # before what a user's error says of itself
            raise TraceFailure(in_words(error)) from error
        finally:
            if collecting:
                gc.enable()
            self._tracer = None
        return Traced(tracer.graph, tracer.reads.guards())


def _place(kinds: tuple[Kind, ...], tracer: ContainerTracer) -> tuple[Any, ...]:
    """Put a placeholder for each symbolic part of arguments; return the arguments."""
    count = itertools.count()

    def make(kind: Kind) -> fx.Proxy:
        proxy = tracer.create_proxy("placeholder", f"input_{next(count)}", (), {})
        proxy.node.meta["tensor"] = kind == TENSOR
        return proxy

    return tuple([rebuild(kind, make) for kind in kinds])
