"""A forward as a graph, as a trace gives it."""

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normswap.graph.tracing.names import Names
from normswap.graph.tracing.reads import NO_GUARDS, Guards


@dataclass
class Traced:
    """A forward as a graph.

    Attributes:
        graph: its placeholders are the symbolic parts of the arguments, in order.
        names: of what is below the container that was traced.
        guards: what must still hold for it to stand for the forward.
        children: path of a submodule that is called -> whether it certainly returns a tensor.
        alike: whether it stands for containers of the same structure, too.
        variant: what was made of it for containers without inserted layers, if anything.
    """

    graph: fx.Graph
    names: Names
    guards: Guards = NO_GUARDS
    children: dict[str, bool] = field(default_factory=dict)
    alike: bool = True
    variant: Any = None

    def copy(self) -> fx.Graph:
        """Return the graph once more, to be changed."""
        graph = fx.Graph(tracer_cls=self.graph._tracer_cls)
        graph.output(graph.graph_copy(self.graph, {}))
        return graph
