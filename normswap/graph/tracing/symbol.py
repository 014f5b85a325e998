"""The symbolic values that run through a forward while it is traced, and what is asked of them."""

import operator
import sys
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, fx

from normswap.graph.tracing.failure import TraceFailure, is_torch
from normswap.graph.tracing.uses import instructions_of

# Attributes and methods of tensors that may be None.
_OPTIONAL = {"grad", "grad_fn", "get", "pop", "setdefault", "names"}


class Value(fx.Proxy):
    """A symbolic value that keeps in-place arithmetic and item assignment in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise TraceFailure(f"sets .{name} of a tensor inside forward")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        raise TraceFailure("looks up a value known only when it runs in a set, dict or cache")

    def __len__(self) -> int:  # list() asks for it, and takes this error for an answer
        raise TypeError("the length of this value is only known when it runs")

    def __str__(self) -> str:
        # It may be for the message of an error; if the forward goes on, the text is used.
        cast(Any, self.tracer).texts.append(repr(self))
        return repr(self)

    def __format__(self, spec: str) -> str:
        return str(self)

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        step = next((s for s in instructions_of(frame.f_code) if s.offset == frame.f_lasti), None)
        if step is None or step.opname != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)
        items: Any = self
        if not is_certain(self.node):
            items = self.tracer.create_proxy("call_function", sequence_of, (self,), {})
        return iter([items[i] for i in range(step.argval)])

    def __contains__(self, item: Any) -> bool:
        raise TraceFailure("asks what is in a value known only when it runs")

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


def is_certain(node: fx.Node) -> bool:
    """Return whether a node's value, and all that is taken from it, is certainly not None."""
    if node.op in ("placeholder", "get_attr"):
        return True
    target = node.target
    base = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_method":
        return target not in _OPTIONAL and base is not None and is_certain(base)
    if node.op == "call_module":
        return bool(node.meta.get("returns_tensor"))
    name = getattr(target, "__name__", "")
    if name == "multi_head_attention_forward":  # its second result may be None
        return False
    if name in ("getitem", "getattr"):
        key = node.args[1] if len(node.args) > 1 else None
        optional = isinstance(key, str) and key in _OPTIONAL  # a slice is no key of a set
        return not optional and base is not None and is_certain(base)
    module = getattr(target, "__module__", None) or ""
    if module.startswith("normswap."):  # a method, a checkpointed part: what they return is theirs
        return False
    return is_torch(module) or module in ("_operator", "operator", "math", "builtins", "")


def _keep_in_place(name: str) -> None:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(Value, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "imatmul"):
    _keep_in_place(_name)
