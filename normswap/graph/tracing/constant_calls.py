"""Functions of constants that a forward calls: recorded, so that each run computes them."""

from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.value_kinds import any_leaf

SWITCHES = "switches gradients or autocast on or off inside forward"

# They look into what they are given, so that a symbolic value has no say; torchvision's RAFT
# makes a tensor of its channels.
_OF_DATA = (torch.tensor, torch.as_tensor)


class ConstantCalls(TorchFunctionMode):
    """Records torch functions of constants instead of computing them."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if any_leaf((args, kwargs), (fx.Proxy,)) and func not in _OF_DATA:
            return func(*args, **kwargs)
        if "grad_enabled" in name or "autocast" in name:
            if "set" in name:
                raise TraceFailure(SWITCHES)
            return func(*args, **kwargs)
        if name == "__get__":
            return func(*args, **kwargs)
        kind = "call_method" if is_tensor_method_or_property(func) else "call_function"
        target = name if kind == "call_method" else func
        return self.tracer.create_proxy(kind, target, args, kwargs)
