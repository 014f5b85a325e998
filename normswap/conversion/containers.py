"""What the graphs of a model's containers tell before anything is converted."""

import functools

from torch import nn
from torch.nn.modules.module import _forward_unimplemented

from normswap.graph.dispatch import dispatch
from normswap.graph.tracing import (
    Traced,
    TraceFailure,
    TraceSession,
    describe,
    parameters_of,
    write_forward,
)


def read_container(session: TraceSession, module: nn.Module) -> tuple[Traced | None, str]:
    """Trace a module in the mode it is in; return the graph, or why there is none."""
    forward = type(module).forward
    if type(module).__module__.startswith("torch.nn.") or forward is _forward_unimplemented:
        return None, ""
    written = write_forward(parameters_of(forward), dispatch)
    kinds = tuple(describe(value, []) for value in written.examples())
    try:
        return session.trace(module, written.spread, kinds), ""
    except TraceFailure as failure:
        return None, str(failure)


def find_first(model: nn.Module, norms: dict[str, nn.Module]) -> tuple[str, str]:
    """Return the name of the norm that a forward of the model meets first, and how that is known.

    Args:
        model: the model.
        norms: those that may be meant, by name.

    """
    holders = {name.rsplit(".", depth)[0] for name in norms for depth in range(name.count(".") + 1)}
    assumed: list[str] = []

    def meet(name: str, module: nn.Module) -> str | None:
        if name in norms:
            return name
        if name and name not in holders:
            return None
        traced, _ = read(module)
        if traced is None:
            if type(module).forward not in (_forward_unimplemented, nn.Sequential.forward):
                assumed.append(name or type(module).__name__)
            return first(name, module, [child for child, _ in module.named_children()])
        called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
        return first(name, module, called)

    def first(name: str, module: nn.Module, targets: list[str]) -> str | None:
        for target in targets:
            path = f"{name}.{target}" if name else target
            if (found := meet(path, module.get_submodule(target))) is not None:
                return found
        return None

    with TraceSession() as session:
        read = functools.partial(read_container, session)
        found = meet("", model)
    if found is None:
        return next(iter(norms)), "the first in the model; no forward that was read calls one"
    if assumed:
        return found, f"the first in the model; the forward of {assumed[0]} could not be read"
    return found, "the first that a forward meets"
