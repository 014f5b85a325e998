"""The symbolic values that run through a forward while it is traced, and what is asked of them."""

import operator
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from normswap.graph.code.bytecode import read_code
from normswap.graph.code.library import is_library, is_torch
from normswap.graph.code.uses import instructions_of
from normswap.graph.tracing.failure import TraceFailure

# Code that a question of class goes through, which is the question of its caller.
_HANDS_ON = ("abc", "typing", "torch.nn.parameter")


class Value(fx.Proxy):
    """A symbolic value that keeps in-place arithmetic and item assignment, HRNet's, in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

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

    def __getattribute__(self, name: str) -> Any:
        frame = sys._getframe(1)
        if name == "__class__":
            return _class_of(self, frame)
        if not is_library(frame.f_globals.get("__name__")) and _asks(frame):
            raise TraceFailure(f"looks up .{name} of a value, known only when it runs, by its name")
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name != "node" and is_input(self) and not hasattr(Tensor, name):
            raise TraceFailure(f"reads .{name} of its input, which no tensor has by itself")
        if name in ("grad", "grad_fn"):
            raise TraceFailure(f"reads .{name}, which may be None")
        return super().__getattr__(name)


def _asks(frame: types.FrameType) -> bool:
    """Return whether code calls a builtin that symbolic values answer."""
    return frame.f_lasti in read_code(frame.f_code).answered


def _class_of(value: Value, frame: Any) -> type:
    """Answer `isinstance`: DenseNet's layers ask whether a tensor that they are given is a list."""
    while (name := frame.f_globals.get("__name__")) in _HANDS_ON:
        frame = frame.f_back
    if is_torch(name) or not (is_library(name) or _asks(frame)):
        return type(value)
    if is_input(value):
        return Tensor
    raise TraceFailure("asks for the type of a value that is only known when it runs")


def sequence_of(value: Any) -> Any:
    """Return what unpacking takes, by index; of dicts, iterators and others an index is no item."""
    by_index = type(value) is list or type(value) is tuple or isinstance(value, Tensor)
    return value if by_index else tuple(value)


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
