"""Which norms the graphs reach, and how the context gets there."""

from dataclasses import dataclass, field

from torch import nn

from normswap.graph.state import context_argument, state_of
from normswap.graph.tracing import walk


@dataclass
class Reach:
    """How the containers of a converted model hand on the context.

    Attributes:
        delivery: id of a norm layer -> "threaded", where the graph of the container that calls it
            passes the context, or "scoped"; absent where no forward reaches it.
        opaque: name of a container that keeps its own forward -> why.
        traced: how many containers run a graph.
    """

    delivery: dict[int, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    traced: int = 0


def find_reach(model: nn.Module) -> Reach:
    """Follow the calls of containers from the root; one with its own forward may call any below."""
    reach = Reach()
    for module in model.modules():
        state = state_of(module)
        if state is None:
            continue
        reasons = [v.reason for v in state.seen() if v.run is None]
        if reasons:
            reach.opaque[state.fqn] = reasons[0]
        else:
            reach.traced += 1
    seen: set[nn.Module] = set()
    waiting, loose = [model], list[nn.Module]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        state = state_of(module)
        if state is None or state.fqn in reach.opaque:
            waiting += [m for m in module.modules() if state_of(m) is not None]
            loose += module.modules()
            continue
        for variant in state.seen():
            for path, *_ in variant.calls:
                child = walk(module, path)
                if _is_norm(child):
                    reach.delivery[id(child)] = "threaded"
                else:
                    waiting.append(child)
    for module in filter(_is_norm, loose):  # where a graph calls one, that counts
        reach.delivery.setdefault(id(module), "scoped")
    return reach


def _is_norm(module: nn.Module) -> bool:
    return state_of(module) is None and context_argument(module) is not None
