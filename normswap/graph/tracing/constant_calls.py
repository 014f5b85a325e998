"""Functions of torch that a forward calls on nothing symbolic: a graph has no place for them."""

from typing import Any

from torch.overrides import TorchFunctionMode

from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.value_kinds import symbolic_parts

SWITCHES = "switches gradients or autocast on or off inside forward"


class ConstantCalls(TorchFunctionMode):
    """Refuses to compute while a forward is traced, as random numbers, which would move on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if symbolic_parts((args, kwargs)) or name == "__get__":
            return func(*args, **kwargs)
        switches = "grad_enabled" in name
        raise TraceFailure(SWITCHES if switches else f"calls {name}() of nothing that it is given")
