"""Batches that stream through a model: eval mode meanwhile, a progress bar, a uniform sample."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, NormswapError
from normswap.util.arguments import check_callable, check_count, check_flag, describe, listed

# Where a norm that `freeze` keeps in eval mode has the mode it was set to.
FROZEN_MODE = "_normswap_mode"


class Reservoir:
    """A uniform sample, without replacement, of the rows of a stream.

    Attributes:
        rows: what is kept, (kept, ...); None before the first row.
        index: the number in the stream of each row kept, (kept,) int64.
        seen: rows offered so far.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.generator = generator
        self.keys = torch.empty(0, device="cpu", dtype=torch.float32)
        self.index = torch.empty(0, dtype=torch.int64, device="cpu")
        self.rows: Tensor | None = None
        self.seen = 0

    @property
    def complete(self) -> bool:
        """Whether every row offered is kept; the rows are then in the order of the stream."""
        return self.seen == len(self.index)

    def add(self, count: int, take: Callable[[Tensor], Tensor]) -> None:
        """Offer `count` rows; `take` returns those of the indices it is given."""
        # Each row draws a key; those with the largest keys so far are a uniform sample.
        before = len(self.keys)
        how: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # half has many equal ones
        keys = torch.cat([self.keys, torch.rand(count, generator=self.generator, **how)])
        stays = torch.zeros_like(keys, dtype=torch.bool)
        stays[keys.topk(min(self.size, len(keys))).indices] = True
        new = stays[before:].nonzero().flatten()
        left = (~stays[:before]).nonzero().flatten()
        index, fresh, rows = self.seen + new, keys[before:][new], take(new)
        self.seen += count
        # In place: copying the whole sample for every batch took most of the time.
        swapped = len(left)
        self.keys[left], self.index[left] = fresh[:swapped], index[:swapped]
        self.keys = torch.cat([self.keys, fresh[swapped:]])
        self.index = torch.cat([self.index, index[swapped:]])
        if self.rows is None:
            self.rows = rows
            return
        if swapped:
            self.rows[left.to(rows.device)] = rows[:swapped]
        if len(rows) > swapped:
            self.rows = torch.cat([self.rows, rows[swapped:]])


def keep_values(kept: Reservoir, x: Tensor) -> None:
    """Offer the values at each position of x, (N, C, *), as rows (C,)."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    size = flat.shape[2]

    def take(index: Tensor) -> Tensor:
        index = index.to(x.device)
        return flat[index // size, :, index % size].to(torch.promote_types(x.dtype, torch.float32))

    kept.add(len(x) * size, take)


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, moved to its device: a tensor, a tuple that begins with one, a dict.

    Raises:
        ConversionError: a batch of another form, or one that the model fails on.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = [], batch if isinstance(batch, dict) else {}
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    if not isinstance(batch, dict):
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, Tensor):
            raise ConversionError(
                "expected batches that are a tensor, a tuple whose first item is one, or a dict, "
                f"got {type(batch).__name__}; pass forward=lambda model, batch: ..."
            )
        args = [x.to(device)]
    try:
        return model(*args, **kwargs)
    except NormswapError:
        raise
    except Exception as error:
        given = describe(args[0]) if args else f"a dict of {listed(map(str, kwargs))}"
        raise ConversionError(
            f"the model fails on a batch ({given}) with {type(error).__name__}: {error}; expected "
            "what its forward takes, or forward=lambda model, batch: ... for other batches"
        ) from error


def check_stream(loader: Any, forward: Any, batches: Any, progress: Any) -> None:
    """Check what every function that streams batches through a model takes.

    Raises:
        ConversionError: `batches` is no count of at least 1, `loader` nothing that yields batches,
            `forward` no function of a model and a batch, or `progress` no bool.
    """
    if batches is not None:
        check_count("batches", batches, most=sys.maxsize)
    streams = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if not streams or isinstance(loader, str | bytes | dict | type | Tensor):
        raise ConversionError(
            f"expected a loader, something that yields batches, got {describe(loader)}"
        )
    check_callable("forward", forward, "forward(model, batch)", 2)
    check_flag("progress", progress)


def show_progress(
    loader: Iterable[Any], title: str, batches: int | None = None, progress: bool = True
) -> Iterable[Any]:
    """Return the first `batches` of a loader, with a bar on a terminal if tqdm is installed."""
    stream = loader if batches is None else islice(loader, batches)
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        return stream
    # No length is known of a loader over an iterable data set, which has a `__len__` that raises.
    total = min(filter(None, (length_hint(loader), batches)), default=None)
    # disable=None: on a terminal only.
    bar: Iterable[Any] = tqdm(
        stream, title, total, unit="batch", disable=None if progress else True
    )
    return bar


@contextmanager
def undisturbed(model: nn.Module | None = None, seed: int | None = None) -> Iterator[None]:
    """Run a model in eval mode; put modes and torch's generators back.

    Given a seed, torch's CPU generator starts from it meanwhile.
    """
    devices = set() if model is None else {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), modes_kept(model):
        if seed is not None:
            # Loaders draw on the CPU; manual_seed would seed devices that are not put back.
            torch.default_generator.manual_seed(seed)
        if model is not None:
            model.eval()
        yield


@contextmanager
def put_back_on_error(tensors: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Put the values of tensors back where a block raises; yield each one's values before it."""
    before = {tensor: tensor.detach().clone() for tensor in tensors}
    try:
        yield before
    except BaseException:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)
        raise


@contextmanager
def modes_kept(model: nn.Module | None) -> Iterator[None]:
    """Put the modes of a model's modules back, those that frozen norms would have included."""
    modules = [] if model is None else list(model.modules())
    modes = [(module, module.training, vars(module).get(FROZEN_MODE)) for module in modules]
    try:
        yield
    finally:
        for module, mode, frozen in modes:
            module.training = mode
            if frozen is not None:
                module.__dict__[FROZEN_MODE] = frozen
