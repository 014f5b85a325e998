"""Trace a container and compile its graph, the context threaded through."""

import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from normswap.graph.hazards import is_something
from normswap.graph.insert import insert_layers
from normswap.graph.patches import TraceFailure
from normswap.graph.state import ContainerState, Variant, context_argument, walk
from normswap.graph.trace import TraceSession
from normswap.graph.tracer import Traced
from normswap.graph.values import describe, find_other

_MOST_VARIANTS = 64
_COUNT = itertools.count()


def prepare(module: nn.Module, values: tuple[Any, ...], session: TraceSession) -> Variant:
    """Trace a container for arguments like these and the mode it is in; keep the result."""
    state: ContainerState = module._normswap  # type: ignore[assignment]
    key = tuple([describe(value, [], False) for value in values])
    variant, exact = _trace(module, state, key, values, session)
    if exact:
        state.exact.add(key)
        key = tuple([describe(value, [], True) for value in values])
    found = state.variants.setdefault(key, [])
    if sum(map(len, state.variants.values())) >= _MOST_VARIANTS:
        variant = Variant(None, f"met more than {_MOST_VARIANTS} kinds of arguments or settings")
        found.clear()
    found.append(variant)
    return variant


def _trace(
    module: nn.Module, state: ContainerState, key: Any, values: Any, session: TraceSession
) -> tuple[Variant, bool]:
    cls: Any = type(module)
    if state.override is not None:
        return Variant(None, "its forward was replaced on the instance"), False
    other = next((o for o in map(find_other, key) if o), None)
    if other is not None:
        return Variant(None, f"takes a {other}, which no graph takes"), False
    exact_key = tuple([describe(value, [], True) for value in values])
    attempts = [(key, False), (exact_key, False), (exact_key, True)]
    if exact_key == key:
        del attempts[0]
    reason = ""
    for kinds, inline in attempts:
        try:
            traced = session.trace(module, cls.converted_from.forward, cls.spread, kinds, inline)
            insert_layers(traced.graph, module, state.insertions, state.blocks)
            variant = _thread(module, traced)
        except TraceFailure as failure:
            reason = reason or str(failure)
            continue
        if not variant.holds(module):
            return Variant(None, "reads an attribute that is another value each time"), False
        return variant, kinds is exact_key and exact_key != key
    return Variant(None, reason), False


def _thread(module: nn.Module, traced: Traced) -> Variant:
    """Pass the context to the calls that take it, and compile the graph."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    context = _add_context(traced.graph)
    calls, direct = _pass_context(module, traced.graph, context)
    for node, region in traced.regions:
        found = _pass_context(module, region.graph, _add_context(region.graph))
        calls, direct = calls + found[0], direct + found[1]
        region.run = _compile(region.graph, name)
        node.args = (*node.args, context)
    threaded = [c for c in calls if context_argument(module.get_submodule(c)) is not None]
    return Variant(
        run=_compile(traced.graph, name),
        reads=tuple(
            (tuple(path.split(".")) if path else (), name, value)
            for (path, name), value in traced.reads.items()
        ),
        structure=tuple((tuple(p.split(".")), c) for p, c in traced.structure.items()),
        calls=tuple(dict.fromkeys(calls)),
        threaded=tuple(tuple(c.split(".")) for c in dict.fromkeys(threaded)),
        direct=tuple(direct),
        something=_returns_something(traced.graph),
    )


def _returns_something(graph: fx.Graph) -> bool:
    result = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return isinstance(result, fx.Node) and is_something(result)


def _add_context(graph: fx.Graph) -> fx.Node:
    """Add the context as the last placeholder."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_before(placeholders[-1].next if placeholders else first):
        return graph.placeholder("normswap_context")


def _pass_context(
    module: nn.Module, graph: fx.Graph, context: fx.Node
) -> tuple[list[str], list[str]]:
    """Add the context to calls that take it; return the submodules called and tensors read."""
    calls, direct = [], []
    for node in graph.nodes:
        if node.op == "get_attr":
            direct.append(str(node.target))
        elif node.op == "call_module":
            calls.append(str(node.target))
            argument = context_argument(module.get_submodule(calls[-1]))
            if argument is not None:
                node.kwargs = {**node.kwargs, argument: context}
    return calls, direct


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    filename = f"<normswap {next(_COUNT)} {name}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    run: Callable[..., Any] = scope["forward"]
    return run


def prepare_default(module: nn.Module, session: TraceSession) -> None:
    """Trace for tensors where an argument is required, for the default where it is not.

    Both modes are traced where the forward depends on the mode.
    """
    cls: Any = type(module)
    values = cls.example_values()
    state: ContainerState = module._normswap  # type: ignore[assignment]
    state.variants = {key: found for key, found in state.variants.items() if found}
    met = set(state.variants)
    variant = prepare(module, values, session)
    flips = [path for path, name, _ in variant.reads if name == "training"]
    for path in flips:
        child = walk(module, path)
        child.__dict__["training"] = not child.training
    try:
        if flips:
            prepare(module, values, session)
    finally:
        for path in flips:
            child = walk(module, path)
            child.__dict__["training"] = not child.training
    state.assumed = set(state.variants) - met
