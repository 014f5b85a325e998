"""Methods of a container that no graph stands for: called by the graph, not entered.

Serves attention biases that are cached (LeViT, EfficientViT-MSRA, EfficientFormerV2 in timm): their
blocks keep a graph for layers to be inserted into.
"""

import dis
import inspect
import types
from typing import Any

from torch import nn

from normswap.graph.tracing.bytecode import codes_of
from normswap.graph.tracing.failure import is_torch


class Outlined:
    """Calls a method of the container by name; norms it reaches find the context in scope."""

    __module__ = "normswap.graph.tracing.method_calls"

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return getattr(module, self.name)(*args, **kwargs)


def find_changes(cls: type, method: str) -> tuple[set[str], set[str]]:
    """Return the names a method, with what it calls of its class, looks up, and those it sets."""
    looked_up: set[str] = set()
    stored: set[str] = set()
    waiting, met = [method], set[str]()
    while waiting:
        name = waiting.pop()
        function = getattr(cls, name, None)
        function = inspect.unwrap(getattr(function, "fget", function))  # type: ignore[arg-type]
        own = isinstance(function, types.FunctionType) and not is_torch(function.__module__)
        if name in met or not own:
            continue
        met.add(name)
        for code in codes_of(function.__code__):
            steps = dis.get_instructions(code)
            stored |= {str(s.argval) for s in steps if s.opname in ("STORE_ATTR", "DELETE_ATTR")}
            looked_up |= set(code.co_names)
            waiting += code.co_names
    return looked_up, stored


def methods_failed(root: nn.Module, error: BaseException | None) -> list[str]:
    """Return the methods of a container that an error came out of, innermost first."""
    names: list[str] = []
    while error is not None:
        step = error.__traceback__
        while step is not None:
            name = method_of(root, step.tb_frame)
            if name:
                names.insert(0, name)
            step = step.tb_next
        error = error.__cause__
    return names


def method_of(root: nn.Module, frame: types.FrameType) -> str:
    """Return the name of the container's method a frame runs; "" where it runs none."""
    code = frame.f_code
    if code.co_name == "forward" or not code.co_varnames:
        return ""
    if frame.f_locals.get(code.co_varnames[0]) is not root:
        return ""
    method = getattr(type(root), code.co_name, None)
    return code.co_name if getattr(method, "__code__", None) is code else ""
