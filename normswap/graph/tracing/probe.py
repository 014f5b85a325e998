"""What the callees of a trace do to the lists and dicts they are given, found by tracing them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from normswap.graph.state import ContainerState
from normswap.graph.tracing.branches import explore
from normswap.graph.tracing.handed import NOTHING, Effects
from normswap.graph.tracing.patches import TraceFailure
from normswap.graph.tracing.signature import parameters_of, write_forward
from normswap.graph.tracing.trace import TraceSession
from normswap.graph.tracing.tracer import Traced, probe_key
from normswap.graph.tracing.values import describe, find_other

Prepare = Callable[[nn.Module, tuple[Any, ...], TraceSession], Any]


def learn(session: TraceSession, prepare: Prepare) -> bool:
    """Find out what recent traces assumed of callees; return whether they must be made again.

    Args:
        session: of those traces; the callees are traced in it too.
        prepare: traces a converted child.
    """
    needed, session.assumed = session.assumed, []
    return any([_matters(child, values, session, prepare) for child, values in needed])


def _matters(
    child: nn.Module, values: tuple[Any, ...], session: TraceSession, prepare: Prepare
) -> bool:
    if "_normswap" not in vars(child):
        key = probe_key(child, values)
        if key not in session.probed:
            session.probed[key] = _probe(child, values, session, prepare)
        return session.probed[key] != NOTHING
    state: ContainerState = child._normswap  # type: ignore[assignment]
    if state.find(child, values) is None:
        met = set(state.variants)
        prepare(child, values, session)
        for key in state.assumed:  # what was assumed without knowing the call, and failed
            if all(variant.run is None for variant in state.variants.get(key, ())):
                state.variants.pop(key, None)
        state.assumed |= set(state.variants) - met
    variant = state.find(child, values)
    if variant is None:
        raise TraceFailure(f"hands a list to a {type(child).__name__} that cannot be foreseen")
    return variant.run is None or variant.effects != NOTHING


def _probe(
    module: nn.Module, values: tuple[Any, ...], session: TraceSession, prepare: Prepare
) -> Effects | None:
    """Return the effects of a module that is no container; None where they cannot be told."""
    forward = type(module).forward
    written = write_forward(parameters_of(forward), lambda *_: None)
    args, kwargs = values
    kinds = tuple([describe(v, [], True) for v in written.bind(module, *args, **kwargs)])
    if "forward" in vars(module) or any(find_other(kind) for kind in kinds):
        return None

    def trace(answers: tuple[bool, ...]) -> Traced:
        return session.trace(module, forward, written.spread, kinds, answers=answers)

    session.probed[probe_key(module, values)] = None  # should it call itself
    while True:
        session.assumed = []
        try:
            paths = explore(trace)
        except TraceFailure:
            if not learn(session, prepare):
                return None
            continue
        if not learn(session, prepare):
            break
    effects = {path.effects for path in paths}
    return effects.pop() if len(effects) == 1 and not any(p.failure for p in paths) else None
