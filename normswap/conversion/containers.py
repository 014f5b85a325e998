"""What the graphs of a model's containers tell before anything is converted."""

import functools
from typing import Any

from torch import nn
from torch.nn.modules.module import _forward_unimplemented

from normswap.errors import ConversionError
from normswap.graph.dispatch import dispatch
from normswap.graph.tracing import (
    Paths,
    TraceFailure,
    TraceSession,
    describe,
    parameters_of,
    write_forward,
)


def read_container(session: TraceSession, module: nn.Module) -> tuple[Any, Paths, str]:
    """Trace a module; return the kinds of its arguments, its paths, and why there are none."""
    forward = type(module).forward
    if type(module).__module__.startswith("torch.nn.") or forward is _forward_unimplemented:
        return (), Paths([]), ""
    written = write_forward(parameters_of(forward), dispatch)
    kinds = tuple(describe(value, []) for value in written.examples())
    try:
        return kinds, session.paths(module, written.spread, kinds), ""
    except TraceFailure as failure:
        return kinds, Paths([]), str(failure)


def find_first(model: nn.Module, norms: dict[str, nn.Module]) -> tuple[str, str]:
    """Return the name of the norm that a forward of the model meets first, and how that is known.

    Args:
        model: the model.
        norms: those that may be meant, by name.

    Raises:
        ConversionError: which is met first depends on the way through a forward.
    """
    holders = {name.rsplit(".", depth)[0] for name in norms for depth in range(name.count(".") + 1)}
    assumed: list[str] = []

    def meet(name: str, module: nn.Module) -> str | None:
        if name in norms:
            return name
        if name and name not in holders:
            return None
        _, paths, _ = read(module)
        graphs = [path.graph for path in paths.traced if not path.failure]
        if not graphs:
            if type(module).forward not in (_forward_unimplemented, nn.Sequential.forward):
                assumed.append(name or type(module).__name__)
            return first(name, module, [child for child, _ in module.named_children()])
        found = {
            first(name, module, [str(n.target) for n in graph.nodes if n.op == "call_module"])
            for graph in graphs
        }
        if len(found) > 1:
            raise ConversionError(
                f"which norm is the first depends on the way through the forward of "
                f"{name or type(model).__name__} ({', '.join(map(str, sorted(found, key=str)))}); "
                "name one in select="
            )
        return found.pop()

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
