"""What CN launches for inputs of a size and tensors of some kinds: found once, kept by these."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from normswap.functional.triton import cn_kernels, tile
from normswap.functional.triton.launching import BoundLaunch
from normswap.functional.triton.plan import Cut, cut_tables, plan_of
from normswap.functional.triton.sweeps import apply_rows


class Forward(NamedTuple):
    """The launches of a forward, tensors not given yet, and the sizes of what they write."""

    cut: Cut
    values: int
    parts: tuple[int, ...]
    stats: BoundLaunch
    tables: BoundLaunch
    apply: BoundLaunch


class Backward(NamedTuple):
    """The launches of a backward, likewise."""

    values: int
    dots: BoundLaunch
    gradients: BoundLaunch
    combine: BoundLaunch


def values_of(cut: Cut, weighs: bool) -> int:
    """Return how many values all tables have; `cn_kernels.split_rest` says which."""
    instances, rows, contexts, channels, *_ = cut.numbers
    known = contexts * (2 * channels + instances) if weighs else 0
    return (3 * rows + 2 * (contexts + 1)) * channels + 2 * line(contexts) + known


def line(contexts: int) -> int:
    """Return the room of a value for each of K + 1 rows, in whole lines of 16."""
    return (contexts + 16) // 16 * 16


@lru_cache(maxsize=4096)
def forward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, weighs: bool,
    rates: Any, batched: bool, ordered: bool | None, moves: bool, step: int | None,
) -> Forward:  # fmt: skip
    """Return the launches for tensors of these kinds.

    Rates are eps and momentum; `ordered` says whether the index is of sorted labels, None that
    there is none; the step is that of the rows over x.
    """
    p = plan_of(shape, contiguous)
    cut = cut_tables(p, contexts, pooled is not None, weighs)
    instances, rows, _, channels, _, splits, _ = cut.numbers
    # Of those without a label alone, where the moments of the others do not matter.
    some = (0, 0) if batched else (1, contexts)
    numbers = (*(pooled or (0, 0)), *rates, *cut.numbers)
    if moves:
        apply = BoundLaunch(cn_kernels.apply_and_move, p.programs, cut.rows[2:], **p.blocks)
    else:
        apply = apply_rows(p, rows, contexts, step)
    tables = BoundLaunch(
        cn_kernels.tables,
        cut.programs,
        numbers,
        BATCH=batched,
        SORTED=ordered is True,
        **cut.blocks,
    )
    stats = BoundLaunch(tile.stats, p.programs, (*some, *p.geometry), **p.blocks)
    sizes = values_of(cut, weighs), (2, instances, splits, channels)
    return Forward(cut, *sizes, stats, tables, apply)


@lru_cache(maxsize=4096)
def backward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, weighs: bool,
    eps: float, needed: bool, moves: bool,
) -> Backward:  # fmt: skip
    """Return the launches for tensors of these kinds.

    They write dx where it is needed, the last one where the moments of x move with it.
    """
    p = plan_of(shape, contiguous)
    cut = cut_tables(p, contexts, pooled is not None, weighs)
    instances, rows, _, channels, _, splits, _ = cut.numbers
    numbers = (*(pooled or (0, 0)), eps, *cut.numbers[:-1])
    return Backward(
        2 * channels * (instances * splits + (rows if moves else 0)),
        BoundLaunch(tile.dots, p.programs, cut.rows, **p.blocks),
        BoundLaunch(
            cn_kernels.gradients, cut.programs, numbers, MOVES=moves, WEIGHED=weighs, **cut.blocks
        ),
        BoundLaunch(tile.combine, p.programs, cut.rows, **p.blocks),
    )
