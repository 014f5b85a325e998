"""What functions that stream a loader through a model share: batches, a bar, and no traces."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError

Forward: TypeAlias = Callable[[nn.Module, Any], Any] | None


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor; a tuple or list that begins with one; or a dict.

    Raises:
        ConversionError: a batch of another kind.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, dict):
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**moved)
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise ConversionError(
            "expected batches that are a tensor, a tuple whose first item is one, or a dict, got "
            f"{type(batch).__name__}; pass forward=lambda model, batch: ..."
        )
    return model(x.to(device))


def stream(loader: Iterable[Any], batches: int | None, progress: bool, title: str) -> Iterable[Any]:
    """Return the first batches of a loader, all by default, with a bar where tqdm is installed.

    Raises:
        ConversionError: `batches` is no count of at least 1.
    """
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        raise ConversionError(f"expected batches= as a count of at least 1, got {batches!r}")
    first = loader if batches is None else islice(loader, batches)
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        return first
    total = len(loader) if isinstance(loader, Sized) else batches
    if total is not None and batches is not None:
        total = min(total, batches)
    # disable=None: on a terminal only.
    bar: Iterable[Any] = tqdm(first, title, total, unit="batch", disable=None if progress else True)
    return bar


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode; put modes and torch's generators back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
