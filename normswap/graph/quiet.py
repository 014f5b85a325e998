"""Run a model on the side: nothing of it stays, and norms treat samples apart."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from normswap.functional.backward import in_backward
from normswap.graph.outside import find_slots, silence
from normswap.sites import looks_like_norm
from normswap.util.restore_state import remember

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PARALLEL = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def find_obstacle(module: nn.Module) -> str:
    """Return why a module cannot be run on the side; "" where it can."""
    if in_backward():
        return "this runs in backward"
    for part in module.modules():
        if {cls.__name__ for cls in type(part).__mro__} & _PARALLEL:
            return "a part is wrapped for parallel training"
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        return "its parameters are sharded"
    return ""


@contextmanager
def quiet(module: nn.Module, hooks: bool) -> Iterator[tuple[Callable[..., bool], dict[int, bool]]]:
    """Have norms and other leaves in eval mode, where they treat samples apart, and leave no trace.

    Containers keep their mode, on which what they fold may depend. Hooks are left out, but for
    those of torch itself, which compute weights.

    Yields:
        What puts the state back, and the modes by id.
    """
    parts = list(module.modules())
    modes = {id(part): part.training for part in parts}
    tables = [(vars(p), name, p.__dict__[name]) for p in parts for name in _HOOKS if vars(p)[name]]
    try:
        for table, name, own in tables if not hooks else ():
            kept = [(k, h) for k, h in own.items() if _is_of_torch(h)]
            table[name] = OrderedDict(kept)
        undo = remember(module, find_slots(module))
        try:
            for part in parts:
                if part.training and (not part._modules or _is_norm(part)):
                    part.__dict__["training"] = False
            with silence():
                yield undo, modes
        finally:
            for part in parts:
                part.__dict__["training"] = modes[id(part)]
            undo()
    finally:
        for table, name, own in tables:
            table[name] = own


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _is_norm(module: nn.Module) -> bool:
    return looks_like_norm(module) or "running_mean" in module._buffers
