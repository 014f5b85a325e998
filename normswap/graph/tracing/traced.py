"""A path through a forward, as a trace gives it."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from normswap.graph.tracing.list_effects import Writes
from normswap.graph.tracing.reads import Reads


@dataclass
class Traced:
    """A path through a forward as a graph.

    Attributes:
        graph: its placeholders are the symbolic parts of the arguments, in order.
        reads: what must still hold for it to stand for the forward.
        children: path of a submodule that is called -> whether it certainly returns a tensor.
        alike: whether it stands for containers of the same structure, too.
        outlined: nodes that call a method of the container.
        questions: nodes whose truth the forward branched on.
        answers: the truth this trace took them for.
        asked_in: methods of the container that asked.
        writes: what it changes of the lists and dicts it is given; where there is any, the graph
            returns (output, their new contents).
        failure: why this path ends after its last question; "" where the forward returns.
    """

    graph: fx.Graph
    reads: Reads = field(default_factory=Reads)
    children: dict[str, bool] = field(default_factory=dict)
    alike: bool = True
    outlined: list[fx.Node] = field(default_factory=list)
    questions: list[fx.Node] = field(default_factory=list)
    answers: tuple[bool, ...] = ()
    asked_in: list[str] = field(default_factory=list)
    writes: Writes = ()
    failure: str = ""

    def copy(self) -> "Traced":
        """Return a path with a graph of its own, to be changed."""
        graph = fx.Graph(tracer_cls=self.graph._tracer_cls)
        nodes: dict[fx.Node, Any] = {}
        output = graph.graph_copy(self.graph, nodes)
        if not self.failure:
            graph.output(output)
        mapped = [[nodes[node] for node in found] for found in (self.outlined, self.questions)]
        return replace(self, graph=graph, outlined=mapped[0], questions=mapped[1])
