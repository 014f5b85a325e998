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
    Values,
    Variant,
    forward_of,
    needs_context,
    takes_arguments_as_given,
    takes_context,
)
from normswap.graph.tracing import (
    Kind,
    Traced,
    TraceFailure,
    TraceSession,
    describe,
    flipped,
    structure_of,
)
from normswap.util.original_class import STATE, container_class

_MOST_VARIANTS = 64
_COUNT = itertools.count()


def prepare(module: nn.Module, values: Values, session: TraceSession) -> Variant:
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


def _variant(
    module: nn.Module, state: ContainerState, key: tuple[Kind, ...], session: TraceSession
) -> Variant:
    if state.override is not None:
        return Variant(None, "had its forward replaced on the instance")
    # Blocks of a stage are alike; what holds inserted layers is made for itself.
    alike = (container_class(module), key, structure_of(module))
    made: list[Variant] = [] if state.insertions else session.made.setdefault(alike, [])
    found = next((variant for variant in made if variant.holds(module)), None)
    if found is not None:
        return found
    try:
        traced = session.trace(module, forward_of(module).spread, key)
        insert_layers(traced.graph, module, state.insertions, state.blocks)
        variant = _thread(module, traced)
    except TraceFailure as failure:
        return Variant(None, str(failure))
    if not variant.holds(module):
        return Variant(None, "reads an attribute that is another value each time")
    made.append(variant)
    return variant


def _thread(module: nn.Module, traced: Traced) -> Variant:
    """Pass the context to the calls that take it, and compile the graph."""
    graph = traced.graph
    calls = _pass_context(module, graph)
    return Variant(
        run=_compile(graph, f"{type(module).__module__}.{type(module).__qualname__}"),
        guards=traced.guards,
        calls=tuple(_call(module, path) for path in calls),
        scoped=_misses_norms(module, calls),
    )


def _call(module: nn.Module, path: str) -> tuple[tuple[str, ...], type, bool]:
    child = module.get_submodule(path)
    return tuple(path.split(".")), type(child), takes_arguments_as_given(child)


def _misses_norms(module: nn.Module, calls: set[str]) -> bool:
    """Return whether norms are below no call that passes the context on."""
    scope = vars(module)[STATE].scope
    children = map(module.get_submodule, calls)
    covered = {m for c in children if takes_context(c, scope) for m in c.modules()}
    norms = (m for m in module.modules() if STATE not in vars(m) and m not in covered)
    return any(needs_context(norm, scope) for norm in norms)


def _pass_context(module: nn.Module, graph: fx.Graph) -> set[str]:
    """Add the context as the last placeholder and to calls that take it; return what is called."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_before(placeholders[-1].next if placeholders else first):
        context = graph.placeholder("normswap_context")
    scope = vars(module)[STATE].scope
    calls = [node for node in graph.nodes if node.op == "call_module"]
    for node in calls:
        argument = takes_context(module.get_submodule(str(node.target)), scope)
        if argument is not None:
            node.kwargs = {**node.kwargs, argument: context}
    return {str(node.target) for node in calls}


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
    values = forward_of(module).examples()
    state: ContainerState = vars(module)[STATE]
    state.variants = {key: found for key, found in state.variants.items() if found}
    met = set(state.variants)
    variant = prepare(module, values, session)
    with flipped(module, variant.guards) as depends:
        if depends:
            prepare(module, values, session)
    state.assumed = set(state.variants) - met
