"""Which norms the graphs reach, and how the context gets there."""

from dataclasses import dataclass, field

from torch import nn

from normswap.graph.state import context_argument, state_of
from normswap.graph.tracing import walk


@dataclass
class Reach:
    """How the containers of a converted model hand on the context.

    Attributes:
        delivery: id of a norm layer -> "threaded" or "scoped"; absent where no forward reaches it.
        opaque: name of a container that keeps its own forward -> why.
        traced: how many containers run a graph.
    """

    delivery: dict[int, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    traced: int = 0


def find_reach(model: nn.Module) -> Reach:
    """Follow the calls of the graphs from the root."""
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
    seen: set[tuple[int, bool]] = set()
    queue: list[tuple[nn.Module, bool]] = [(model, True)]
    while queue:
        module, threaded = queue.pop()
        if (id(module), threaded) in seen:
            continue
        seen.add((id(module), threaded))
        state = state_of(module)
        if state is None:
            if context_argument(module) is not None:
                if not threaded or id(module) not in reach.delivery:
                    reach.delivery[id(module)] = "threaded" if threaded else "scoped"
            else:
                queue += [(child, False) for child in module.children()]
            continue
        for variant in state.seen():
            if variant.run is None:
                queue += [(m, False) for m in module.modules() if m is not module]
            else:
                queue += [(walk(module, path), threaded) for path, *_ in variant.calls]
    return reach
