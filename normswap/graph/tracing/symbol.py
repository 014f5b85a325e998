"""The symbolic values that run through a forward while it is traced."""

import operator
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, fx

from normswap.errors import ConversionError
from normswap.graph.tracing.patches import TraceFailure


class Value(fx.Proxy):
    """A symbolic value that keeps in-place arithmetic and item assignment in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):
            raise TraceFailure(f"sets .{name} of a tensor inside forward")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        raise TraceFailure("looks up a value only known when it runs in a set, dict or cache")

    def __len__(self) -> int:  # list() asks for it, and takes this error for an answer
        raise TypeError("the length of this value is only known when it runs")

    def __getattr__(self, name: str) -> Any:
        if self.node.meta.get("tensor") and not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)


def unpack(value: Value) -> Iterator[Any] | None:
    """Return the parts of a value that is cut into a number of parts known without running it.

    Returns:
        None where it is not known.
    """
    node, parts = value.node, cast(Any, value)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    given = (*node.args[1:2], *node.kwargs.values())
    sizes = next((v for v in given if isinstance(v, list | tuple)), None)
    if name in ("split", "split_with_sizes") and sizes is not None:
        return iter([parts[i] for i in range(len(sizes))])
    length: Any = None
    if name == "chunk":
        length = node.kwargs.get("chunks", node.args[1] if len(node.args) > 1 else None)
    elif name == "getitem" and _is_shape(node.args[0]):
        part: Any = node.args[1]
        if isinstance(part, slice) and part.step is None:
            first = part.start in (None, 0) and isinstance(part.stop, int) and part.stop > 0
            last = part.stop is None and isinstance(part.start, int) and part.start < 0
            length = part.stop if first else -part.start if last else None
    if type(length) is not int:
        return None
    value.tracer.create_proxy("call_function", check_parts, (value, length), {})
    return iter([parts[i] for i in range(length)])


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return bool(node.target == "size" and len(node.args) == 1 and not node.kwargs)


def check_parts(value: Any, length: int) -> None:
    """Raise where a value has another number of parts than the graph takes of it.

    Raises:
        ConversionError: naming both numbers.
    """
    if len(value) != length:
        raise ConversionError(
            f"expected {length} parts, as this forward asks for, got {len(value)}: the input is "
            "too small, or has too few dimensions, to be cut so"
        )


def _keep_in_place(name: str) -> None:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(Value, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "imatmul"):
    _keep_in_place(_name)
