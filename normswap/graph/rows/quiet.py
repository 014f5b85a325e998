"""Run a model on the side: nothing of it stays or is heard, and norms treat samples apart."""

import inspect
import io
import logging
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.utils._python_dispatch import _disable_current_modes

from normswap.functional.recomputation import in_backward
from normswap.graph.code.bytecode import returns_nothing
from normswap.graph.rows.reached import function_of
from normswap.graph.rows.snapshot import Snapshot
from normswap.sites import looks_like_norm
from normswap.util.distributed import is_sharded

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# The key of a hook beside the user's.
_RESCALING = -1
_PARALLEL = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def find_obstacle(module: nn.Module) -> str:
    """Return why a module cannot be run on the side; "" where it can."""
    if in_backward():
        return "this runs in backward"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "this runs under a transform of torch.func"
    for part in module.modules():
        if {cls.__name__ for cls in type(part).__mro__} & _PARALLEL:
            return "a part is wrapped for parallel training"
    if is_sharded(module):
        return "its parameters are sharded"
    return ""


@contextmanager
def quiet(
    module: nn.Module, hooks: bool, rescale: bool = False
) -> Iterator[tuple[Snapshot, dict[int, bool]]]:
    """Have norms and other leaves in eval mode, where they treat samples apart, and leave no trace.

    Containers keep their mode, on which what they fold may depend. Hooks run that may return
    something, which is then what the model goes on with, those of torch itself, which compute
    weights, and those of all modules; others, which only look, are left out, as are modes that see
    each tensor operation (counts of FLOPs, selective checkpointing).

    Running statistics that do not fit a network yet, as those of one that starts to train, may
    leave nothing of the samples after some norms; `rescale` has norms return each row at a scale
    of its own.

    Yields:
        What puts the state back, and the modes by id.
    """
    parts = list(module.modules())
    modes = {id(part): part.training for part in parts}
    tables = [(vars(p), {name: vars(p)[name] for name in ("training", *_HOOKS)}) for p in parts]
    try:
        for part in parts:
            norm = looks_like_norm(part) or "running_mean" in part._buffers
            if not part._modules or norm:
                part.__dict__["training"] = False
            for name in () if hooks else _HOOKS:
                kept = [(k, hook) for k, hook in vars(part)[name].items() if takes_part(hook)]
                part.__dict__[name] = OrderedDict(kept)
            if (
                rescale
                and norm
                and ("running_mean" in part._buffers or hasattr(part, "num_features"))
            ):
                part.__dict__["_forward_hooks"] = OrderedDict(
                    {**part._forward_hooks, _RESCALING: _rescale_rows}
                )
        with _silence(), _disable_current_modes():
            snapshot = Snapshot(module)
            try:
                yield snapshot, modes
            finally:
                snapshot.restore()
    finally:
        for table, own in tables:
            table.update(own)


def after_hooks(module: nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what the pre-hooks of a container make of the arguments of its forward.

    Those that see keyword arguments are left out: they see the labels, and may move them, too.
    """
    written: Any = type(module)._normswap_forward  # type: ignore[attr-defined]
    takes = list(inspect.signature(written.bind).parameters.values())[1:]
    seen, own = module._forward_pre_hooks_with_kwargs, module._forward_pre_hooks
    hooks = [hook for key, hook in own.items() if key not in seen]

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A caller leaves defaults out.
        while args and len(args) <= len(takes) and args[-1] is takes[len(args) - 1].default:
            args = args[:-1]
        for hook in (*_global_forward_pre_hooks.values(), *hooks):
            made = hook(module, args)
            if made is not None:
                args = made if isinstance(made, tuple) else (made,)
        return written.bind(module, *args, **kwargs)

    made: tuple[Any, ...] = written.spread(run, module, values)
    return made


def has_onlookers(module: nn.Module) -> bool:
    """Return whether hooks of the user's return nothing, and are left out."""
    hooks = (h for part in module.modules() for name in _HOOKS for h in vars(part)[name].values())
    return not all(map(takes_part, hooks))


def takes_part(hook: Any) -> bool:
    """Return whether a hook may return something, or is torch's."""
    if str(getattr(hook, "__module__", "")).startswith("torch."):
        return True
    function = function_of(hook)
    return function is not None and not returns_nothing(function.__code__)


def _rescale_rows(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return what a norm was given, each row with a mean of zero and values of up to one.

    As in training, about half of them are above zero, so that activations let some through.
    """
    x = args[0] if args else None
    if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape):
        return None
    if not x.numel() or x.is_complex() or x.shape[1:].numel() < 2:
        return None
    rows = x.flatten(1).float()
    rows = rows - rows.mean(1, keepdim=True)
    return (rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-37)).view_as(x).to(output)


class _Silent(io.TextIOBase):
    """Drops what one thread writes; others write to where they did."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        here = threading.get_ident() == self._thread
        return len(text) if here or self._stream is None else self._stream.write(text)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what this thread prints, logs and warns of."""
    thread, handle = threading.get_ident(), logging.Logger.handle

    def handle_others(logger: logging.Logger, record: logging.LogRecord) -> None:
        if threading.get_ident() != thread:
            handle(logger, record)

    out, err = _Silent(sys.stdout), _Silent(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.Logger.handle = handle_others  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            logging.Logger.handle = handle  # type: ignore[method-assign]
