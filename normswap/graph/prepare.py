"""Trace a container and compile its graph, the context threaded through."""

import itertools
import linecache
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from normswap.graph.blocks.insert import insert_layers
from normswap.graph.state import (
    ContainerState,
    Variant,
    own_forward_of,
    state_of,
    takes_arguments_as_given,
    takes_context,
)
from normswap.graph.tracing import (
    Outlined,
    Paths,
    Traced,
    TraceFailure,
    TraceSession,
    Writes,
    describe,
    example_of,
    find_other,
    is_certain,
    is_library,
    join,
    walk,
)
from normswap.util.original_class import STATE

_MOST_VARIANTS = 64
_COUNT = itertools.count()


def open_session(layers: tuple[type, ...] = ()) -> TraceSession:
    """Return a session whose callees are prepared where their effects are asked for."""
    return TraceSession(layers, _writes_of)


def prepare(module: nn.Module, values: tuple[Any, ...], session: TraceSession) -> Variant:
    """Trace a container for arguments like these and the mode it is in; keep the result."""
    state: ContainerState = vars(module)[STATE]
    key = tuple([describe(value, []) for value in values])
    variant = _variant(module, state, key, session)
    found = state.variants.setdefault(key, [])
    if sum(map(len, state.variants.values())) >= _MOST_VARIANTS:
        variant = Variant(None, f"met more than {_MOST_VARIANTS} kinds of arguments or settings")
        found.clear()
    found.append(variant)
    return variant


def _variant(module: nn.Module, state: ContainerState, key: Any, session: TraceSession) -> Variant:
    if state.override is not None:
        return Variant(None, "had its forward replaced on the instance")
    other = next((o for o in map(find_other, key) if o), None)
    if other is not None:
        return Variant(None, f"takes a {other}, which no graph takes")
    cls: Any = type(module)
    try:
        paths = state.planned.pop(key, None)
        if paths is None or not paths.guards.hold(module):
            paths = session.paths(module, cls.spread, key)
        if state.insertions:
            copies = [path.copy() for path in paths.traced]
            for path in copies:
                if not path.failure:
                    insert_layers(path.graph, module, state.insertions, state.blocks)
            variant = _thread(module, copies, paths, key)
        else:
            if paths.variant is None:
                paths.variant = _thread(module, paths.traced, paths, key)
            variant = paths.variant
    except TraceFailure as failure:
        return Variant(None, str(failure))
    if not variant.holds(module):
        return Variant(None, "reads an attribute that is another value each time")
    return variant


def _writes_of(
    session: TraceSession, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Writes] | None:
    """Return what a callee does to the lists and dicts it is given; None if that is unknown."""
    state = state_of(module)
    if state is None or state.override is not None:
        return None
    cls: Any = type(module)
    values: tuple[Any, ...] = cls.bind(module, *args, **kwargs)
    variant = state.find(module, values)
    if variant is None:
        met = set(state.variants)
        variant = prepare(module, tuple(example_of(value) for value in values), session)
        for key in state.assumed:  # what was assumed without knowing the call, and failed
            if all(v.run is None for v in state.variants.get(key, ())):
                state.variants.pop(key, None)
        state.assumed |= set(state.variants) - met
    return None if variant.run is None else (values, variant.writes)


def _thread(module: nn.Module, traced: list[Traced], paths: Paths, kinds: Any) -> Variant:
    """Pass the context to the calls that take it, and compile the graphs."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    calls: list[str] = []
    for path in traced:
        context = _add_context(path.graph)
        _pass_context(module, path.graph, context, calls)
    writes = {path.writes for path in traced if not path.failure}
    if len(writes) > 1:
        raise TraceFailure("changes a list or dict it is given in one branch only")
    own = own_forward_of(kinds, next(iter(writes)))
    run = join(traced, lambda graph: _compile(graph, name), own)
    user_code = any(_calls_code(path.graph) for path in traced)
    return Variant(
        run=run,
        guards=paths.guards,
        calls=tuple(_call(module, path) for path in set(calls)),
        returns_tensor=all(path.failure or _returns_tensor(path) for path in traced),
        writes=next(iter(writes)),
        calls_user_code=user_code,
        scoped=user_code or _misses_norms(module, calls),
    )


def _call(module: nn.Module, path: str) -> tuple[tuple[str, ...], type, bool]:
    child = module.get_submodule(path)
    return tuple(path.split(".")), type(child), takes_arguments_as_given(child)


def _calls_code(graph: fx.Graph) -> bool:
    """Return whether a graph calls code of the user's, which may reach any norm."""
    functions = {node.target for node in graph.nodes if node.op == "call_function"}
    return any(
        isinstance(f, Outlined)
        or (isinstance(f, types.FunctionType) and not is_library(f.__module__))
        for f in functions
    )


def _misses_norms(module: nn.Module, calls: list[str]) -> bool:
    """Return whether norms are below no call that passes the context on."""
    scope = vars(module)[STATE].scope
    children = map(module.get_submodule, calls)
    covered = {m for c in children if takes_context(c, scope) for m in c.modules()}
    norms = (m for m in module.modules() if STATE not in vars(m) and m not in covered)
    return any(takes_context(norm, scope) for norm in norms)


def _returns_tensor(path: Traced) -> bool:
    result: Any = next(n for n in reversed(path.graph.nodes) if n.op == "output").args[0]
    if path.writes:
        result = result[0]
    return isinstance(result, fx.Node) and is_certain(result)


def _add_context(graph: fx.Graph) -> fx.Node:
    """Add the context as the last placeholder."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_before(placeholders[-1].next if placeholders else first):
        return graph.placeholder("normswap_context")


def _pass_context(module: nn.Module, graph: fx.Graph, context: fx.Node, calls: list[str]) -> None:
    """Add the context to calls that take it; collect the submodules called."""
    for node in graph.nodes:
        if node.op == "call_module":
            calls.append(str(node.target))
            scope = vars(module)[STATE].scope
            argument = takes_context(module.get_submodule(calls[-1]), scope)
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
    state: ContainerState = vars(module)[STATE]
    state.variants = {key: found for key, found in state.variants.items() if found}
    met = set(state.variants)
    variant = prepare(module, values, session)
    flips = [path for path, name, _ in variant.guards.attributes if name == "training"]
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
