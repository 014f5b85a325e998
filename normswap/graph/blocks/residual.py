"""Find the residual blocks in a container's graph: which add ends one, which operand is what."""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from normswap.graph.blocks.channels import Features, Reader, agree
from normswap.util.arguments import as_count

_ADDS = (operator.add, operator.iadd, torch.add)
_WORK = (F.conv1d, F.conv2d, F.conv3d, F.linear, torch.matmul, operator.matmul, torch.bmm)
_STOCHASTIC = ("DropPath", "StochasticDepth", "Dropout", "Dropout2d", "Identity")


@dataclass(frozen=True)
class Residual:
    """A residual add.

    Attributes:
        add: the node that ends the block.
        branch: position (0 or 1) of the branch among its operands.
        start: the node where branch and skip part.
        path: the nodes of the branch, in order, after `start`.
        reason: why the branch is the branch.
    """

    add: fx.Node
    branch: int
    start: fx.Node
    path: tuple[fx.Node, ...]
    reason: str

    @property
    def branch_end(self) -> fx.Node:
        """The operand that is the end of the branch."""
        return self.add.all_input_nodes[self.branch]

    @property
    def skip_end(self) -> fx.Node:
        """The operand that is the end of the skip."""
        return self.add.all_input_nodes[1 - self.branch]


def find_residuals(
    graph: fx.Graph, module: nn.Module, joined: bool = False
) -> tuple[list[Residual], list[str]]:
    """Return the residual adds of a graph in order, and what else might be one and why not.

    An add is residual where its operands share an ancestor and convolutions or linear layers lie
    on the way from there to one of them. That operand is the branch; where both have such work,
    the one with more. As much on both is reported, not guessed.

    Args:
        graph: of a container.
        module: the container.
        joined: whether an argument that is added as it is counts as a skip, too: a caller may hand
            a block its own skip, as DLA in timm.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    sizes = _sizes(graph)
    before = _ancestors(graph, sizes)
    unclear: list[fx.Node] = []
    shared_skips: set[fx.Node] = set()
    found: list[Residual] = []
    ambiguous: list[str] = []
    for node in graph.nodes:
        operands = node.all_input_nodes
        if not _is_add(node) or len(operands) != 2:
            continue
        sides = [before[operand] | {operand} for operand in operands]
        shared = {n for n in sides[0] & sides[1] if n.op != "get_attr" and n not in sizes}
        if not shared and joined:
            shared = _shared_skips(operands, sides)
            shared_skips |= {node} if shared else set()
        if not shared:
            continue
        start = max(shared, key=order.__getitem__)
        if _takes_apart(start, sides):
            continue
        paths = [sorted(side - before[start] - {start}, key=order.__getitem__) for side in sides]
        weights = [sum(_work(n, module) for n in path) for path in paths]
        names = [[_describe(n) for n in path if _work(n, module)] for path in paths]
        if weights[0] == weights[1]:
            if weights[0]:
                unclear.append(node)
                ambiguous.append(
                    f"{node.name}: both operands have {weights[0]} layers on their way "
                    f"({', '.join(names[0])} | {', '.join(names[1])})"
                )
            continue
        branch = 0 if weights[0] > weights[1] else 1
        skip = ", ".join(names[1 - branch]) or "identity"
        reason = f"branch {', '.join(names[branch])}; skip {skip}"
        found.append(Residual(node, branch, start, tuple(paths[branch]), reason))
    # An add on the branch of another block is a part of that block, not a block's end.
    outermost = [r for r in found if r.add not in shared_skips]
    inner = {r.add for r in found for outer in outermost if r.add in outer.path}
    # Nor is one that is an operand of an add that nobody can tell.
    inner |= {operand for node in unclear for operand in node.all_input_nodes}
    return [r for r in found if r.add not in inner], ambiguous


def _shared_skips(operands: list[fx.Node], sides: list[set[fx.Node]]) -> set[fx.Node]:
    """Return where the branch starts of which one operand is an argument as it is."""
    skips = [i for i, operand in enumerate(operands) if operand.op == "placeholder"]
    return {n for i in skips for n in sides[1 - i] if n.op == "placeholder"}


def _sizes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are shapes or numbers rather than features."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        asks = name in ("size", "dim", "numel", "len", "int") or (
            name == "getattr" and node.args[1] in ("shape", "ndim", "dtype", "device")
        )
        inputs = node.all_input_nodes
        if asks or (inputs and node.op != "call_module" and all(i in found for i in inputs)):
            found.add(node)
    return found


def _takes_apart(start: fx.Node, sides: list[set[fx.Node]]) -> bool:
    """Return whether a side starts from a part of a value: what it is added to is another one."""
    return any(
        user.op == "call_function" and user.target is operator.getitem and user in side
        for user in start.users
        for side in sides
    )


def _ancestors(graph: fx.Graph, sizes: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Return the nodes whose features reach a node; to ask for their size alone is not to."""
    before: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        inputs = [i for i in node.all_input_nodes if i not in sizes]
        before[node] = set(inputs).union(*(before[i] for i in inputs))
    return before


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ADDS
    return node.op == "call_method" and node.target in ("add", "add_")


def _describe(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _work(node: fx.Node, module: nn.Module) -> int:
    """Return how many convolutions and linear layers a node runs."""
    if node.op == "call_function":
        return int(node.target in _WORK)
    if node.op != "call_module":
        return 0
    inner = module.get_submodule(str(node.target)).modules()
    return sum(isinstance(m, _ConvNd | nn.Linear) for m in inner)


def before_stochastic(node: fx.Node, module: nn.Module) -> fx.Node:
    """Return the end of a branch before the stochastic depth or dropout that may follow it."""
    while node.op == "call_module" and node.all_input_nodes:
        if type(module.get_submodule(str(node.target))).__name__ not in _STOCHASTIC:
            break
        node = node.all_input_nodes[0]
    return node


def features_of(residual: Residual, reader: Reader, placement: str) -> Features:
    """Return the features at a place of a block; unknown where those at its add are."""
    branch, skip = (reader.read(end) for end in (residual.branch_end, residual.skip_end))
    added = agree([branch, skip])
    start = reader.read(residual.start)
    start = start if start.known else reader.taken(residual.start)
    identity = before_stochastic(residual.skip_end, reader.module) is residual.start
    if not (branch.known and skip.known):
        added = branch if branch.known else skip
        if not added.known and identity:
            added = start
        if added.channels == 1 and identity and start.channels != 1:
            return Features()  # one may be broadcast to those of the other side
    if not added.known or placement == "post":
        return added
    if placement == "pre":
        return start if start.known or not identity else added
    own = branch if placement == "residual" else skip
    return own if own.known else added


def input_channels(model: nn.Module) -> int | None:
    """Return the channels of a model's input, from its first convolution, linear layer or norm."""
    for layer in model.modules():
        for name in ("in_channels", "in_features", "num_features"):
            count = as_count(getattr(layer, name, None))
            if count is not None and not any(layer.children()):
                return count
    return None
