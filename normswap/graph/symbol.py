"""The symbolic values that run through a forward while it is traced."""

import operator
from typing import Any

from torch import Tensor, fx

from normswap.graph.patches import TraceFailure


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

    def __getattr__(self, name: str) -> Any:
        if self.node.meta.get("tensor") and not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)


def _keep_in_place(name: str) -> None:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(Value, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "imatmul"):
    _keep_in_place(_name)
