"""What CN launches for inputs of a size and tensors of some kinds: found once, kept by these."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from normswap.functional.triton import cn_kernels, tile
from normswap.functional.triton.launching import BoundLaunch
from normswap.functional.triton.plan import Plan, cut_contexts, cut_rows, plan_of
from normswap.functional.triton.sweeps import apply_rows


class Cut(NamedTuple):
    """How a layer's tables lie in one tensor, and programs share them; by sizes alone.

    Attributes:
        values: of all tables, float32; `cn_kernels.split_rest` says which.
        numbers: what kernels over tables take as N, R, K, C, M, S and PART; R, rows of centre,
            scale and shift, is K + 1, or K + N where samples weigh the contexts.
        rows: what kernels over x take as scale, stride, R, K and geometry.
        blocks: constants of kernels over tables.
        programs: of a launch over them.
    """

    values: int
    numbers: tuple[int, ...]
    rows: tuple[int | None, ...]
    blocks: dict[str, int]
    programs: int


class Forward(NamedTuple):
    """The launches of a forward, tensors not given yet, and the sizes of what they write."""

    cut: Cut
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


def cut_of(p: Plan, contexts: int, pools: bool, weighs: bool) -> Cut:
    """Return the cut of tables for x that is cut so."""
    instances, channels, positions = p.shape
    programs, blocks = cut_rows(contexts + pools, channels)
    rows, values = contexts + 1, 2 * (contexts + 1) * channels + 2 * line(contexts)
    if weighs:
        rows, values = contexts + instances, values + contexts * (2 * channels + instances)
        programs += instances
    numbers = (instances, rows, contexts, channels, positions, p.splits, p.part)
    blocks |= cut_contexts(contexts, channels) if weighs else {"KP": 0, "WN": 1, "WC": 1}
    over_x = (None, None, rows, contexts, *p.geometry)
    return Cut(values + 3 * rows * channels, numbers, over_x, blocks, programs)


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
    cut = cut_of(p, contexts, pooled is not None, weighs)
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
    return Forward(cut, (2, instances, splits, channels), stats, tables, apply)


@lru_cache(maxsize=4096)
def backward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, weighs: bool,
    eps: float, needed: bool, moves: bool,
) -> Backward:  # fmt: skip
    """Return the launches for tensors of these kinds.

    They write dx where it is needed, the last one where the moments of x move with it.
    """
    p = plan_of(shape, contiguous)
    cut = cut_of(p, contexts, pooled is not None, weighs)
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
