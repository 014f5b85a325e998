"""Trace a container and compile its graph, the context threaded through."""

import itertools
import linecache
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from normswap.graph.blocks.insert import insert_layers
from normswap.graph.state import (
    ContainerState,
    Variant,
    context_argument,
    own_forward_of,
    walk,
)
from normswap.graph.tracing.branches import explore, join
from normswap.graph.tracing.hazards import is_something
from normswap.graph.tracing.patches import TraceFailure
from normswap.graph.tracing.probe import learn
from normswap.graph.tracing.trace import TraceSession
from normswap.graph.tracing.tracer import Traced
from normswap.graph.tracing.values import describe, find_other

_MOST_VARIANTS = 64
_MOST_OUTLINED = 4
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
            variant = _trace_paths(module, state, kinds, inline, session)
        except TraceFailure as failure:
            reason = reason or str(failure)
            continue
        if not variant.holds(module):
            return Variant(None, "reads an attribute that is another value each time"), False
        return variant, kinds is exact_key and exact_key != key
    return Variant(None, reason), False


def _trace_paths(
    module: nn.Module, state: ContainerState, kinds: Any, inline: bool, session: TraceSession
) -> Variant:
    """Trace every path of a forward, methods that no graph stands for left out of the graph."""
    cls: Any = type(module)
    names = session.known.names_of(module)
    alike = (cls, kinds, inline)
    known = None if state.insertions else session.known.find(alike, names, module)
    if known is not None:
        return known
    outlined = session.outlined.get(cls.converted_from, ())

    def trace(answers: tuple[bool, ...]) -> Traced:
        forward = cls.converted_from.forward
        return session.trace(module, forward, cls.spread, kinds, inline, answers, outlined)

    while True:
        session.assumed = []
        try:
            paths = explore(trace)
        except TraceFailure as failure:
            if learn(session, prepare):
                continue
            method = next((m for m in failure.methods if m not in outlined), None)
            if method is None or len(outlined) == _MOST_OUTLINED:
                raise
            outlined = session.outlined[cls.converted_from] = (*outlined, method)
            continue
        if not learn(session, prepare):
            break
    for path in paths:
        if not path.failure:
            insert_layers(path.graph, module, state.insertions, state.blocks)
    variant = _thread(module, paths, kinds)
    if not state.insertions:
        session.known.keep(alike, names, variant, paths)
    return variant


def _thread(module: nn.Module, paths: list[Traced], kinds: Any) -> Variant:
    """Pass the context to the calls that take it, and compile the graphs."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    calls: list[str] = []
    direct: list[str] = []
    reads: dict[tuple[str, str], Any] = {}
    structure: dict[str, tuple[str, ...]] = {}
    for path in paths:
        context = _add_context(path.graph)
        _pass_context(module, path.graph, context, calls, direct)
        for node, region in path.regions:
            inner = _add_context(region.graph)
            _pass_context(module, region.graph, inner, calls, direct)
            for call in region.outlined:
                call.args = (call.args[0], inner, *call.args[1:])
            region.run = _compile(region.graph, name)
            node.args = (*node.args, context)
        for node in path.outlined:
            node.args = (node.args[0], context, *node.args[1:])
        reads.update(path.reads)
        structure.update(path.structure)
    outlined: list[Any] = [node.target for path in paths for node in path.outlined]
    outlined += [n.target for path in paths for _, region in path.regions for n in region.outlined]
    outside = bool(outlined) and _norms_outside(module, calls)
    for method in outlined:
        method.scoped = outside
    effects = {path.effects for path in paths if not path.failure}
    if len(effects) > 1:
        raise TraceFailure("changes or returns a list or dict it is given in one branch only")
    own = own_forward_of(kinds, tuple(index for index, _ in next(iter(effects)).writes))
    run = join(paths, lambda graph: _compile(graph, name), own)
    threaded = [c for c in calls if context_argument(module.get_submodule(c)) is not None]
    return Variant(
        run=run,
        reads=tuple(
            (tuple(path.split(".")) if path else (), name, value)
            for (path, name), value in reads.items()
        ),
        structure=tuple((tuple(p.split(".")), c) for p, c in structure.items()),
        calls=tuple(dict.fromkeys(calls)),
        threaded=tuple(tuple(c.split(".")) for c in dict.fromkeys(threaded)),
        direct=tuple(direct),
        something=all(path.failure or _returns_something(path) for path in paths),
        effects=next(iter(effects)),
        rest=outside,
    )


def _norms_outside(module: nn.Module, calls: list[str]) -> bool:
    """Return whether some norm is below no submodule that the graph calls."""
    called = {id(m) for call in calls for m in module.get_submodule(call).modules()}
    return any(
        context_argument(m) is not None and id(m) not in called
        for m in module.modules()
        if m is not module
    )


def _returns_something(path: Traced) -> bool:
    result: Any = next(n for n in reversed(path.graph.nodes) if n.op == "output").args[0]
    if path.effects.writes:
        result = result[0]
    return isinstance(result, fx.Node) and is_something(result)


def _add_context(graph: fx.Graph) -> fx.Node:
    """Add the context as the last placeholder."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_before(placeholders[-1].next if placeholders else first):
        return graph.placeholder("normswap_context")


def _pass_context(
    module: nn.Module, graph: fx.Graph, context: fx.Node, calls: list[str], direct: list[str]
) -> None:
    """Add the context to calls that take it; collect the submodules called and tensors read."""
    for node in graph.nodes:
        if node.op == "get_attr":
            direct.append(str(node.target))
        elif node.op == "call_module":
            calls.append(str(node.target))
            argument = context_argument(module.get_submodule(calls[-1]))
            if argument is not None:
                node.kwargs = {**node.kwargs, argument: context}


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    filename = f"<normswap {next(_COUNT)} {name}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    run: Callable[..., Any] = scope["forward"]
    # Its source serves tracebacks as long as it can run.
    weakref.finalize(run, linecache.cache.pop, filename, None).atexit = False
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
