"""Gradient checkpointing inside a traced forward: a graph of its own, run under checkpoint.

Entering the checkpointed function would lose the recomputation; leaving it a call would lose the
context. So it is traced apart, and the outer graph calls it with the context as an argument, which
checkpoint keeps for the recomputation. Serves timm's models under ``set_grad_checkpointing`` whose
stages are compiled one by one: compiled code cannot ask which forward it is computed again for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.list_effects import find_writes, snapshot_lists
from normswap.graph.tracing.value_kinds import describe, find_other, rebuild
from normswap.util.original_class import STATE

_CHECKPOINT = torch.utils.checkpoint.checkpoint
_OPTIONS = {
    "use_reentrant",
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
    "respect_saved_tensors_hooks",
}


class Region:
    """The checkpointed part of a forward.

    Attributes:
        graph: its placeholders are the arguments, then the values of the outer graph it uses.
        captured: those values, outer node -> inner placeholder.
        options: keyword arguments of checkpoint.
        run: the compiled graph, ``run(module, *values, context)``; set once it is threaded.
    """

    __name__ = "checkpoint_region"
    __module__ = "normswap.graph.tracing.region"

    def __init__(self, graph: fx.Graph, options: dict[str, Any]) -> None:
        self.graph = graph
        self.captured: dict[fx.Node, fx.Node] = {}
        self.options = options
        self.run: Callable[..., Any] | None = None

    def capture(self, node: fx.Node) -> fx.Node:
        """Return the placeholder for a value of the outer graph."""
        if node not in self.captured:
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1:]
            first = next(iter(self.graph.nodes), None)
            before = last[0].next if last else first
            with self.graph.inserting_before(before):
                placeholder = self.graph.placeholder(f"captured_{len(self.captured)}")
            placeholder.meta = dict(node.meta)
            self.captured[node] = placeholder
        return self.captured[node]

    def __call__(self, module: Any, *values: Any) -> Any:
        """Run the region; the last value is the context."""
        *tensors, context = values
        run = self.run
        assert run is not None

        def function(*given: Any) -> Any:
            if torch.compiler.is_compiling():
                return run(module, *given, context)
            # In backward this runs without the container around it.
            scope = vars(module)[STATE].scope
            left = scope.enter(context)
            try:
                return run(module, *given, context)
            finally:
                scope.leave(left)

        return _CHECKPOINT(function, *tensors, **self.options)


def _split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split checkpoint's keyword arguments into its own and those of the function."""
    own = {k: v for k, v in kwargs.items() if k in _OPTIONS}
    return own, {k: v for k, v in kwargs.items() if k not in _OPTIONS}


def trace_checkpointed(tracer: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Trace a checkpointed function apart and record its call."""
    if tracer.region is not None:
        raise TraceFailure("nests gradient checkpointing")
    if not callable(function):
        raise TraceFailure("uses checkpoint as a decorator inside forward")
    options, kwargs = _split_options(kwargs)
    outer: list[Any] = []
    kinds = [describe(value, outer) for value in (args, kwargs)]
    if any(map(find_other, kinds)):
        raise TraceFailure("checkpoints a function of objects that no graph takes")
    region = Region(fx.Graph(tracer_cls=type(tracer)), options)
    tracer.graph, tracer.region = region.graph, region
    try:
        inner = [
            tracer.create_proxy("placeholder", f"value_{i}", (), {}) for i in range(len(outer))
        ]
        for proxy, given in zip(inner, outer, strict=True):
            proxy.node.meta = dict(given.node.meta)
        supply = iter(inner)
        given_args, given_kwargs = (rebuild(kind, supply) for kind in kinds)
        before = snapshot_lists((given_args, *given_kwargs.values()))
        output = function(*given_args, **given_kwargs)
        if find_writes(tuple(given_args), before, output):
            raise TraceFailure("changes a list or dict in a checkpointed part")
        tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    finally:
        tracer.graph, tracer.region = tracer.result.graph, None
    # The region names submodules by path from the container, so it is handed the container.
    itself = tracer.create_proxy("get_attr", "converted_container", (), {})
    captured = [fx.Proxy(node, tracer) for node in region.captured]
    value = tracer.create_proxy("call_function", region, (itself, *outer, *captured), {})
    tracer.result.regions.append((value.node, region))
    tracer.result.alike = False  # its graph is not copied
    if isinstance(output, tuple | list):
        parts: Any = value
        return type(output)(parts[i] for i in range(len(output)))
    return value
