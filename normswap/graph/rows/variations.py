"""Other samples in place of those of a batch, or beside them: what tells the rows of one sample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normswap.graph.rows.samples import SPARSE, fresh, noting, rebuild, tensors_of

# How a sample is changed, in this order: each reaches what the one before it may have missed.
HOWS = ("others", "shuffle", "noise")
_MOST_OTHERS = 3


def rolled(batch: Any) -> Any:
    """Return the batch with its last sample first."""
    if not isinstance(batch, Tensor):
        return fresh([*batch[-1:], *batch[:-1]])
    return fresh(batch.roll(1, 0))


def shifted(beside: Any) -> Any:
    """Return what is no batch with its last entry first; a single number as another one.

    Entries are along the longest dimension: an index may have one row, or two, as ends of edges,
    that are alike or name what is of two sizes.
    """
    if not beside.dim():
        return ended(beside.reshape(1), 0).reshape(())
    longest = beside.shape.index(max(beside.shape))
    if beside.layout not in SPARSE:
        return fresh(beside.roll(1, longest))
    entries = beside.detach().to_sparse(layout=torch.sparse_coo).coalesce()
    indices = entries.indices().clone()
    indices[longest] = (indices[longest] + 1) % beside.shape[longest]
    new = torch.sparse_coo_tensor(indices, entries.values(), entries.shape).coalesce()
    blocked = beside.layout in (torch.sparse_bsr, torch.sparse_bsc)
    size = tuple(beside.values().shape[-2:]) if blocked else None
    return new.to_sparse(layout=beside.layout, blocksize=size)


def ended(batch: Any, at: int) -> Any:
    """Return the batch with a sample that ends earlier, by its length, mask or padding.

    Of numbers that may tell kinds, a zero becomes one: order goes by kind, too.
    """
    if not isinstance(batch, Tensor):
        new = fresh([*batch])
        if isinstance(new[0], int):
            return ended(torch.tensor(new, device="cpu"), at).tolist()
        whole = isinstance(new[at], Tensor) and not new[at].dim()
        if isinstance(new[at], Tensor | str) and not whole and len(new[at]) > 1:
            new[at] = new[at][:-1]
        return new
    values = batch.detach().clone()
    one = values[at]
    if one.dim() and one.dtype != torch.bool:
        # Time may be the first or the last dimension of a sample.
        one[1:], one[..., 1:] = 0, 0
    elif one.dtype == torch.bool:
        (one[..., -1:] if one.dim() else one).logical_not_()
    else:
        one.copy_(torch.where(one == 0, 1, one / 2))
    return fresh(values.requires_grad_(batch.requires_grad))


def rank_of(batch: Any) -> int:
    """Return how likely a batch is what a forward is about, and not what goes with it.

    The ranks are 2: tensors; 1: what holds tensors; 0: masks, texts, and one number a sample, as
    lengths and labels; -1: one flag a sample, and what has no tensors.
    """
    if isinstance(batch, Tensor):
        if batch.dtype == torch.bool:
            return 0 if batch.dim() > 1 else -1
        return 2 if batch.dim() > 1 else batch.dim() - 1
    if all(isinstance(part, Tensor) for part in batch):
        return 2
    if all(isinstance(part, str) for part in batch):
        return 0
    return 1 if all(map(tensors_of, batch)) else -1


@torch.no_grad()
def exchange(batch: Any, picked: list[int], how: str, generator: torch.Generator) -> Any:
    """Return a batch whose picked samples are changed, their values staying in its range.

    Args:
        batch: a tensor (N, ...), N tensors or what holds them, or N texts.
        picked: indices of the samples.
        how: "others": at each place the value another sample has there; "shuffle": a sample's own
            elements in another order; "noise": values between the least and the largest.
        generator: what they are drawn from.
    """
    if isinstance(batch, Tensor) and batch.is_complex():
        return torch.view_as_complex(exchange(torch.view_as_real(batch), picked, how, generator))
    if isinstance(batch[0], str):
        return _exchange_texts(batch, picked) if how == "others" else batch
    if not isinstance(batch[0], Tensor):
        return _exchange_within(batch, picked, how, generator)
    values = [part.detach() for part in batch]
    new = [part.clone() for part in values]
    for i in picked:
        if how == "others":
            for step in range(1, min(len(values), _MOST_OTHERS + 1)):
                other = values[(i + step) % len(values)]
                if other.shape == new[i].shape:
                    new[i] = torch.where(new[i] == values[i], other, new[i])
        elif how == "shuffle":
            order = torch.randperm(new[i].numel(), generator=generator, device="cpu")
            order = order.to(new[i].device)
            new[i] = values[i].flatten()[order].view(values[i].shape)
        elif new[i].numel():
            new[i] = _noise(values, values[i], generator)
    if not isinstance(batch, Tensor):
        return new
    # In the memory format of the batch.
    return torch.empty_like(batch.detach()).copy_(torch.stack(new))


def _exchange_texts(batch: list[str], picked: list[int]) -> list[str]:
    """Exchange texts for others of their own lengths, by which forwards may sort or pad them."""
    new = [*batch]
    for i in picked:
        length = len(batch[i])
        others = [(other * length)[:length] for other in [*batch[i + 1 :], *batch[:i]]]
        new[i] = next((o for o in others if sorted(o) != sorted(batch[i])), batch[i])
    return new


def _exchange_within(
    batch: list[Any], picked: list[int], how: str, generator: torch.Generator
) -> list[Any]:
    """Exchange the tensors that samples hold, each for those of the others in its place."""
    tensors: list[list[Tensor]] = [[] for _ in batch]
    for part, parts in zip(batch, tensors, strict=True):
        rebuild(part, -1, fresh, False, noting(parts))
    for at, place in enumerate(zip(*tensors, strict=False)):
        if all(rank_of(part) >= 0 for part in place):
            for parts, new in zip(tensors, exchange([*place], picked, how, generator), strict=True):
                parts[at] = new

    def next_of(parts: list[Tensor]) -> Callable[[Any], Any]:
        left = iter(parts)
        return lambda _: next(left)

    return [rebuild(p, -1, fresh, False, next_of(t)) for p, t in zip(batch, tensors, strict=True)]


def _noise(batch: list[Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Return values drawn between the least and the largest of a batch."""
    values = torch.cat([part.flatten() for part in batch]).cpu().double()
    values = values[values.isfinite()]
    low, high = map(float, values.aminmax()) if values.numel() else (0.0, 0.0)
    if low == high and like.dtype in (torch.bool, torch.uint8):
        # A mask or an image; other integers may be of a table that holds no others.
        return like.logical_not().to(like.dtype)
    draw = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    if like.is_floating_point():
        return (low + (high - low or 1.0) * draw).to(like)
    return (low + (high - low + 1) * draw).floor().clamp(max=high).to(like)
