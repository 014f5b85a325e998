"""Batches that stream through a model: eval mode meanwhile, and a progress bar."""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import nn


def show_progress(
    loader: Iterable[Any], title: str, batches: int | None = None, progress: bool = True
) -> Iterable[Any]:
    """Return the first `batches` of a loader, with a bar on a terminal if tqdm is installed."""
    stream = loader if batches is None else islice(loader, batches)
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        return stream
    total = len(loader) if isinstance(loader, Sized) else batches
    if total is not None and batches is not None:
        total = min(total, batches)
    # disable=None: on a terminal only.
    bar: Iterable[Any] = tqdm(
        stream, title, total, unit="batch", disable=None if progress else True
    )
    return bar


@contextmanager
def undisturbed(model: nn.Module | None = None, seed: int | None = None) -> Iterator[None]:
    """Run a model in eval mode; put modes and torch's generators back.

    Args:
        model: if any.
        seed: what torch's generators start from meanwhile; they go on as they are by default.
    """
    modules = [] if model is None else list(model.modules())
    modes = [(module, module.training) for module in modules]
    devices = set() if model is None else {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            if seed is not None:
                torch.manual_seed(seed)
            if model is not None:
                model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
