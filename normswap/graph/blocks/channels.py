"""What a value in a graph is: how many channels it has, and in which dimension they lie.

Followed back to the layers that tell, through what keeps channels as they are; what may move or
count them otherwise (reshape, matmul, code nobody can read) makes them unknown.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from normswap.util.arguments import as_count

FIRST, LAST = 1, -1
# Functions and methods by name: those that keep channels, and those of two values.
_KEEP = (
    *("relu", "relu_", "relu6", "silu", "gelu", "elu", "leaky_relu", "mish", "hardswish", "celu"),
    *("hardsigmoid", "hardtanh", "hardtanh_", "sigmoid", "sigmoid_", "tanh", "softplus", "selu"),
    *("dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "clamp", "clamp_"),
    *("neg", "softmax", "batch_norm", "instance_norm", "group_norm", "layer_norm", "normalize"),
    *("exp", "square", "sqrt", "abs", "pow", "clone", "contiguous", "detach", "to", "type"),
    *("type_as", "float", "half", "double", "bfloat16", "requires_grad_"),
)
_BOTH = (
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "truediv", "maximum"),
    *("iadd", "isub", "imul", "itruediv"),
)
_KEEP_MODULES = ("activation", "dropout", "linear")
_NOT_KEPT = (nn.GLU, nn.MultiheadAttention)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class Features(NamedTuple):
    """Channels of a value, and the dimension that holds them; None where it is not known.

    Attributes:
        channels: C.
        dimension: 1 or -1.
    """

    channels: int | None = None
    dimension: int | None = None

    @property
    def known(self) -> bool:
        """Whether both are."""
        return self.channels is not None and self.dimension is not None


UNKNOWN = Features()
GraphOf = Callable[[nn.Module], fx.Graph | None]


class Reader:
    """Reads features in the graph of a module.

    Args:
        module: the module.
        graph_of: the graph of a module; None where it cannot be traced.
        given: features of the placeholders of the graph, by name.
    """

    def __init__(
        self, module: nn.Module, graph_of: GraphOf, given: dict[str, Features] | None = None
    ) -> None:
        self.module, self.graph_of, self.given = module, graph_of, given or {}
        self._known: dict[fx.Node, Features] = {}

    def read(self, value: Any) -> Features:
        """Return the features of a node; of what is no node, unknown ones."""
        if not isinstance(value, fx.Node):
            return UNKNOWN
        if value not in self._known:
            self._known[value] = UNKNOWN  # of a value that leads back to itself
            self._known[value] = self._read(value)
        return self._known[value]

    def _read(self, node: fx.Node) -> Features:
        if node.op == "placeholder":
            return self.given.get(node.name, UNKNOWN)
        if node.op == "call_module":
            arguments = [self.read(value) for value in node.args]
            return self.of_module(self.module.get_submodule(str(node.target)), arguments)
        if node.op not in ("call_function", "call_method") or not node.args:
            return UNKNOWN
        name = str(getattr(node.target, "__name__", node.target))
        if name in _BOTH:
            return self._combined([v for v in node.args[:2] if isinstance(v, fx.Node)])
        if name in _KEEP:
            return self.read(node.args[0])
        if name in ("cat", "concat"):
            return self._concatenated(node)
        if name == "permute":
            return self._permuted(node)
        if node.target is operator.getitem:
            return self._sliced(node)
        return UNKNOWN

    def of_module(self, module: nn.Module, arguments: Sequence[Features]) -> Features:
        """Return the features of what a module returns for arguments with these."""
        first = arguments[0] if arguments else UNKNOWN
        if isinstance(module, _ConvNd):
            return Features(as_count(module.out_channels), FIRST)
        if isinstance(module, nn.Linear):
            return Features(as_count(module.out_features), LAST)
        if isinstance(module, _NORMS):
            return Features(_count(module), FIRST)
        if type(module) is nn.LayerNorm:
            return Features(module.normalized_shape[-1], LAST)
        if type(module) is nn.Sequential:
            for child in module:
                first = self.of_module(child, [first])
            return first
        if type(module).__module__.startswith("torch.nn."):
            kind = type(module).__module__.rpartition(".")[2]
            kept = kind in _KEEP_MODULES and not isinstance(module, _NOT_KEPT)
            return first if kept else UNKNOWN
        graph = self.graph_of(module)
        if graph is None:
            return UNKNOWN
        names = [n.name for n in graph.nodes if n.op == "placeholder"]
        given = dict(zip(names, arguments, strict=False))
        output = next(n for n in graph.nodes if n.op == "output").args[0]
        return Reader(module, self.graph_of, given).read(output)

    def taken(self, node: fx.Node) -> Features:
        """Return the features of a value by the layers that take it, if those that tell agree."""
        found = [self._taken_by(user, node) for user in node.users]
        return agree([f for f in found if f.known])

    def _taken_by(self, user: fx.Node, node: fx.Node) -> Features:
        if user.op != "call_module" or not user.args or user.args[0] is not node:
            return UNKNOWN
        module = self.module.get_submodule(str(user.target))
        while type(module) is nn.Sequential and len(module):
            module = module[0]
        if isinstance(module, _ConvNd):
            return Features(module.in_channels, FIRST)
        if isinstance(module, nn.Linear):
            return Features(module.in_features, LAST)
        if isinstance(module, _NORMS):
            return Features(_count(module), FIRST)
        graph = self.graph_of(module)
        entry = next((n for n in graph.nodes if n.op == "placeholder"), None) if graph else None
        return UNKNOWN if entry is None else Reader(module, self.graph_of).taken(entry)

    def _combined(self, values: Sequence[fx.Node]) -> Features:
        given = [v for v in values if v.op == "get_attr"]
        found = agree([self.read(value) for value in values if value not in given])
        # A parameter may have more channels than the one it meets.
        return UNKNOWN if given and found.channels == 1 else found

    def _concatenated(self, node: fx.Node) -> Features:
        parts: Any = node.args[0]
        dimension = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, (list, tuple)) or not parts:
            return UNKNOWN
        found = [self.read(part) for part in parts]
        if any(not f.known or f.dimension != dimension for f in found):
            return UNKNOWN
        return Features(sum(f.channels or 0 for f in found), found[0].dimension)

    def _permuted(self, node: fx.Node) -> Features:
        """Follow channels of four-dimensional values to the last dimension, as EdgeNeXt in timm."""
        order: Any = node.args[1:] or node.kwargs.get("dims", ())
        order = order[0] if order and isinstance(order[0], (list, tuple)) else order
        value = self.read(node.args[0])
        if not (value.known and order) or not all(isinstance(d, int) for d in order):
            return UNKNOWN
        place = [d % len(order) for d in order].index((value.dimension or 0) % len(order))
        places = {1: FIRST, len(order) - 1: LAST}
        return Features(value.channels, places.get(place))

    def _sliced(self, node: fx.Node) -> Features:
        """Count channels that are kept of more, as GhostNet in timm."""
        value, index = self.read(node.args[0]), node.args[1]
        if value.dimension != FIRST or not isinstance(index, tuple) or len(index) < 2:
            return UNKNOWN
        part = index[1]
        if index[0] != slice(None) or not isinstance(part, slice):
            return UNKNOWN
        ends = (part.start, part.stop, part.step)
        if any(not isinstance(end, int | None) for end in ends) or value.channels is None:
            return UNKNOWN
        return Features(len(range(*part.indices(value.channels))), FIRST)


def agree(found: Sequence[Features]) -> Features:
    """Return the features of values that are added or multiplied: of those known, if all agree.

    One channel may be broadcast to those of another value.
    """
    known = {f for f in found if f.known and f.channels != 1}
    if not known and all(f.known for f in found):
        known = set(found)
    return known.pop() if len(known) == 1 else UNKNOWN


def _count(norm: nn.Module) -> int | None:
    count = getattr(norm, "num_features", None) or getattr(norm, "num_channels", None)
    return as_count(count)
