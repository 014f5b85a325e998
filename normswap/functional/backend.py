"""Which kernels serve a tensor: Triton's, or torch's operators. The one place that decides."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Where Triton's kernels run, and what they read; float64 is for torch's operators.
DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TORCHS = (Tensor, nn.Parameter)
# Whether torch's operators are to serve, since something watches them.
WATCHED: ContextVar[bool] = ContextVar("normswap_watched", default=False)


def is_scripted() -> bool:
    """Return whether `torch.jit.trace` runs this: sizes are tensors."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing())


def is_traced() -> bool:
    """Return whether a compiler, a tracer or fake tensors run this: no value can be read."""
    if torch.compiler.is_compiling() or is_scripted():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(m) is not None for m in (modes.FAKE, modes.PROXY))


def is_eager() -> bool:
    """Return whether nothing but autograd's backward looks at what runs: no compiler, no transform.

    A compiler, tracer, functorch transform or forward-mode derivative needs torch's operators.
    """
    if is_traced():
        return False
    transformed: bool = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0


def untraced(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward of a Function, which no compiler of autograd is to look into.

    It would trace what is done by hand, and kernels that it cannot call.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            disabled = torch._dynamo.disable(backward)  # type: ignore[no-untyped-call]
            return disabled(ctx, *grads)
        return backward(ctx, *grads)

    return run


def is_readable(t: Tensor) -> bool:
    """Return whether the host can read a tensor of torch's own class: it has values."""
    return is_torchs_own(t) and not (is_traced() or t.is_meta)


def is_torchs_own(t: Tensor) -> bool:
    """Return whether a tensor is torch's own: kernels do not know what a subclass overrides."""
    return type(t) in _TORCHS


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Return a block without autocast on the device of a tensor, if it has one."""
    kind = t.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def may_serve(x: Tensor) -> bool:
    """Return whether Triton's kernels run on the device of a tensor at all."""
    return x.device.type in DEVICES


def triton_for(x: Tensor, name: str = "sweeps", *tables: Tensor | None) -> Any:
    """Return a module of `normswap.functional.triton` if it serves x here and now, else None.

    Args:
        x: contiguous or with its channels last.
        name: of the module: the passes over x by default.
        tables: tensors that kernels are to read, or to write, as they lie.
    """
    device, dtype = x.device, x.dtype
    if device.type not in DEVICES or dtype not in _DTYPES or x.dim() < 3 or not is_eager():
        return None
    if type(x) not in _TORCHS or x.numel() == 0 or WATCHED.get():
        return None
    for t in tables:
        if t is not None and not (type(t) in _TORCHS and t.is_contiguous() and t.device == device):
            return None
    if not _works(device, dtype) or not _module("plan").serves(x):
        return None
    return _module(name)


@cache
def _module(name: str) -> Any:
    return import_module(f"normswap.functional.triton.{name}")


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel could be compiled and started on a device; say why not, once.

    What NORMSWAP_TRITON says is asked once, too: looking it up takes the time of a launch.
    """
    if os.environ.get("NORMSWAP_TRITON") == "0":
        return False
    try:
        sweeps = import_module("normswap.functional.triton.sweeps")
        one = torch.ones(1, 1, 1, device=device)
        sweeps.affine(one.to(dtype), one[0], None)
    except Exception as error:  # of the import, of Triton, of its compilers
        warnings.warn(
            f"Triton's kernels don't work on {device} for {dtype}, torch's slower operators serve: "
            f"{type(error).__name__}: {error}; NORMSWAP_TRITON=0 asks for that without a warning",
            stacklevel=2,
        )
        return False
    return True
