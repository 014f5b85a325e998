"""Put a call of an inserted layer at a place of a residual block's graph."""

from typing import NamedTuple

from torch import fx, nn

from normswap.graph.blocks.residual import Residual, before_stochastic, find_residuals
from normswap.graph.tracing import TraceFailure

PLACEMENTS = ("pre", "residual", "identity", "post")


class InsertedLayer(NamedTuple):
    """A layer inserted in a residual block.

    Attributes:
        placement: "pre" (input of the branch only), "residual" (end of the branch, before
            stochastic depth), "identity" (end of the skip, after its downsample), or "post"
            (after the add, before what follows it).
        block: which residual add of the container, counted in the order of its forward.
        child: name of the layer in the container.
    """

    placement: str
    block: int
    child: str


def insert_layers(
    graph: fx.Graph, module: nn.Module, insertions: tuple[InsertedLayer, ...], blocks: int
) -> None:
    """Insert calls into a graph.

    Args:
        graph: of the container.
        module: the container.
        insertions: what to insert where.
        blocks: how many residual adds the container had when the insertions were planned.

    Raises:
        TraceFailure: the graph has another number of residual adds, so that places moved.
    """
    if not insertions:
        return
    found, _ = find_residuals(graph, module)
    if len(found) < blocks:
        found, _ = find_residuals(graph, module, joined=True)
    if len(found) != blocks:
        raise TraceFailure(f"has {len(found)} residual adds here, had {blocks} when planned")
    for insertion in insertions:
        order = {node: index for index, node in enumerate(graph.nodes)}
        value, users = _place(found[insertion.block], insertion.placement, module)
        if not users:
            raise TraceFailure(f"its branch at {value.name} does not start from the shared input")
        with graph.inserting_before(min(users, key=order.__getitem__)):
            call = graph.call_module(insertion.child, (value,))
        for user in users:
            user.replace_input_with(value, call)


def _place(block: Residual, placement: str, module: nn.Module) -> tuple[fx.Node, list[fx.Node]]:
    """Return the value that an inserted layer takes, and who takes the layer's instead."""
    if placement == "pre":
        return block.start, [n for n in block.path if block.start in n.all_input_nodes]
    if placement == "residual":
        end = before_stochastic(block.branch_end, module)
        return end, [n for n in (*block.path, block.add) if end in n.all_input_nodes]
    if placement == "identity":
        return block.skip_end, [block.add]
    return block.add, list(block.add.users)
