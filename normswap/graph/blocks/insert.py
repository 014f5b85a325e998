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
    order = {node: index for index, node in enumerate(graph.nodes)}
    for insertion in insertions:
        _INSERT[insertion.placement](graph, module, found[insertion.block], insertion.child, order)


def _call(graph: fx.Graph, before: fx.Node, child: str, value: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        return graph.call_module(child, (value,))


def _insert_pre(
    graph: fx.Graph, module: nn.Module, block: Residual, child: str, order: dict[fx.Node, int]
) -> None:
    users = [n for n in block.path if block.start in n.all_input_nodes and n in order]
    if not users:
        raise TraceFailure(f"its branch at {block.add.name} does not start from the shared input")
    call = _call(graph, min(users, key=order.__getitem__), child, block.start)
    for user in users:
        user.replace_input_with(block.start, call)


def _insert_residual(
    graph: fx.Graph, module: nn.Module, block: Residual, child: str, order: dict[fx.Node, int]
) -> None:
    end = before_stochastic(block.branch_end, module)
    users = [n for n in (*block.path, block.add) if end in n.all_input_nodes]
    call = _call(graph, min(users, key=order.__getitem__), child, end)
    for user in users:
        user.replace_input_with(end, call)


def _insert_identity(
    graph: fx.Graph, module: nn.Module, block: Residual, child: str, order: dict[fx.Node, int]
) -> None:
    skip = block.skip_end
    block.add.replace_input_with(skip, _call(graph, block.add, child, skip))


def _insert_post(
    graph: fx.Graph, module: nn.Module, block: Residual, child: str, order: dict[fx.Node, int]
) -> None:
    call = _call(graph, block.add.next, child, block.add)
    for user in list(block.add.users):
        if user is not call:
            user.replace_input_with(block.add, call)


_INSERT = {
    "pre": _insert_pre,
    "residual": _insert_residual,
    "identity": _insert_identity,
    "post": _insert_post,
}
