"""The symbolic values that run through a forward while it is traced, and what is asked of them."""

import operator
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.uses import instructions_of


class Value(fx.Proxy):
    """A symbolic value that keeps in-place arithmetic and item assignment, HRNet's, in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise TraceFailure(f"sets .{name} of a tensor inside forward")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        raise TraceFailure("looks up a value known only when it runs in a set, dict or cache")

    def __len__(self) -> int:
        raise TraceFailure("asks for the length of a value known only when it runs")

    def __str__(self) -> str:
        raise TraceFailure("writes, as text, a value known only when it runs")

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        step = next((s for s in instructions_of(frame.f_code) if s.offset == frame.f_lasti), None)
        if step is None or step.opname != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)
        items: Any = self.tracer.create_proxy("call_function", sequence_of, (self,), {})
        return iter([items[i] for i in range(step.argval)])

    def __getattr__(self, name: str) -> Any:
        if name != "node" and is_input(self) and not hasattr(Tensor, name):
            raise TraceFailure(f"reads .{name} of its input, which no tensor has by itself")
        if name in ("grad", "grad_fn"):
            raise TraceFailure(f"reads .{name}, which may be None")
        return super().__getattr__(name)


def sequence_of(value: Any) -> Any:
    """Return what unpacking takes, by index; of dicts, iterators and others an index is no item."""
    known = type(value) is list or type(value) is tuple or isinstance(value, Tensor)
    return value if known else tuple(value)


def is_input(value: Any) -> bool:
    """Return whether a value is a tensor that the forward is given."""
    return value.node.op == "placeholder" and bool(value.node.meta.get("tensor"))


def is_given(node: fx.Node) -> bool:
    """Return whether a value is an argument or a parameter, not None: DLA's blocks in timm ask."""
    return node.op in ("placeholder", "get_attr")


def _keep_in_place(name: str) -> None:
    """Keep ``x += shortcut``, as of ResNets."""

    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(Value, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "imatmul"):
    _keep_in_place(_name)
