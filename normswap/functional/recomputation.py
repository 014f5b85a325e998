"""Whether a forward runs inside backward, and which checkpointed forwards a forward belongs to."""

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._compile import _disable_dynamo
from torch.utils import checkpoint

_FILE = checkpoint.__file__
_Frame: Any = checkpoint._CheckpointFrame
UNKNOWN: Any = object()


def in_backward() -> bool:
    """Return whether autograd's engine is running this code.

    A forward that runs there is a recomputation, by `torch.utils.checkpoint` of either kind or by
    a reversible block: what it should do once a step, its first run did. Compiled code says False:
    the compiler recomputes values alone, never updates of buffers.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def may_run_again() -> bool:
    """Return whether backward may compute this forward again; cheap, and never wrongly False.

    Checkpointing keeps tensors through hooks, or runs in the forward of an autograd function,
    where forward-mode gradients are off.
    """
    # The compiler, which meets this frame by itself after a graph break, cannot ask for the hooks.
    if torch.compiler.is_compiling():
        return True
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return True
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def find_checkpoints() -> Iterator[Any]:
    """Yield what stands for each checkpointed forward that this code runs in, innermost first.

    It is the same object in forward and in the recomputation: the frame of
    `torch.utils.checkpoint`, or the ``ctx`` of an autograd function.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in () if hooks is None else getattr(hooks[0], "__closure__", None) or ():
        if isinstance(cell.cell_contents, _Frame):
            yield cell.cell_contents
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE:
            names = frame.f_locals
            found = names.get("frame")
            generator = getattr(names.get("gen"), "gi_frame", None)
            if generator is not None:
                found = generator.f_locals.get("new_frame")
            if isinstance(found, _Frame):
                yield found
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] != ("self",):
            found = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(found, torch.autograd.function.BackwardCFunction):
                yield found
        frame = frame.f_back


class Remembered:
    """A value for each checkpointed forward, found again where backward computes that again."""

    def __init__(self) -> None:
        self._values: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    # It reads frames of Python. `torch.compiler.disable` imports the compiler at once, for seconds.
    @_disable_dynamo
    def keep(self, value: Any) -> None:
        """Note the value for every checkpointed forward this code runs in."""
        for key in find_checkpoints():
            if self._values.setdefault(key, value) is not value:
                self._values[key] = UNKNOWN

    @_disable_dynamo
    def recall(self, outside: Any) -> Any:
        """Return the value of the forward this code computes again.

        Args:
            outside: what it is if this is no recomputation.

        Returns:
            The value; `UNKNOWN` where it had none, or several.
        """
        for key in find_checkpoints():
            outside = UNKNOWN
            if key in self._values:
                return self._values[key]
        return outside
