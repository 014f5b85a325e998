"""CN by Triton's kernels: three launches forward in training, three backward; two in evaluation.

One more in evaluation where samples without a label weigh the contexts, for their moments.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.moments import Moments
from normswap.functional.segments import count
from normswap.functional.tables import records
from normswap.functional.triton import cn_kernels, sweeps, tile
from normswap.functional.triton.cn_formula import Norm as Norm
from normswap.functional.triton.cn_formula import norm_by_formula
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Rows, cut_contexts, plan
from normswap.functional.triton.recording import Tensors, Way, record
from normswap.functional.triton.sorting import find_rows, sort_labels


class Cut(NamedTuple):
    """How a layer's tables lie in one tensor, and programs share them; by sizes alone.

    Attributes:
        size: R, rows of centre, scale and shift: K + 1, or K + N where samples weigh the contexts.
        values: of all tables, float32; `cn_kernels.split_rest` says which.
        numbers: what kernels over tables take as N, R, K, C, M, S and PART.
        rows: what kernels over x take as scale, stride, R, K and geometry.
        blocks: what they take as BN, BC, KP, WN and WC.
        programs: of a launch over them.
    """

    size: int
    values: int
    numbers: tuple[int, ...]
    rows: tuple[int | None, ...]
    blocks: dict[str, int]
    programs: int


@lru_cache(maxsize=4096)
def _cut(
    instances: int, geometry: tuple[int, ...], contexts: int, pools: bool, weighs: bool
) -> Cut:
    channels, positions, *_, splits, part = geometry
    own = Rows(contexts + pools, channels)
    size, values = contexts + 1, 2 * (contexts + 1) * channels + 2 * _line(contexts)
    blocks, programs = {"KP": 0, "WN": 1, "WC": 1}, own.programs
    if weighs:
        size, values = contexts + instances, values + contexts * (2 * channels + instances)
        blocks, programs = cut_contexts(contexts, channels), own.programs + instances
    numbers = (instances, size, contexts, channels, positions, splits, part)
    values += 3 * size * channels
    rows = (None, None, size, contexts, *geometry)
    return Cut(size, values, numbers, rows, {**own.blocks, **blocks}, programs)


def _line(contexts: int) -> int:
    return (contexts + 16) // 16 * 16


def norm_contexts(
    x: Tensor, labels: Tensor | None, norm: Norm, batched: bool, note: Callable[..., None] | None
) -> Tensor:
    """Return x normalised with the moments of each instance's context.

    Args:
        x: (N, C, *).
        labels: (N,) in [-1, K); or (1,), that of all; None where all are -1.
        norm: the layer.
        batched: whether with the moments of the batch, where a context has two values or more.
        note: called with the moments each context is normalised with and its number of values.
    """
    contexts, instances = norm.weight.shape[0], x.shape[0]
    geometry = plan(x).geometry
    cut = _cut(instances, geometry, contexts, norm.pooled is not None, norm.weighs)
    if not batched and not records((x, norm.weight, norm.bias)):
        index = None
        if norm.weighs and labels is not None:
            index = labels = find_rows(labels.expand(instances), contexts)
        tables = _make_tables(x, norm, cut, index, False, False)
        return sweeps.affine_of(x, tables, labels, cut.size, contexts)
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    found = sort_labels(labels.expand(instances), contexts, norm.weighs).packed
    return record(_WAY, (norm, cut, found, batched, note), x, norm.weight, norm.bias)


def _make_tables(
    x: Tensor, norm: Norm, cut: Cut, index: Tensor | None, ordered: bool, batched: bool
) -> Tensor:
    """Return all tables; with the row of each instance as index, or all that is sorted."""
    parts = None
    if batched:
        parts = sweeps.part_stats(x)
    elif norm.weighs:
        parts = sweeps.part_stats(x, index, cut.numbers[2])
    found = x.new_empty(cut.values, dtype=torch.float32)
    launch(
        cn_kernels.tables,
        cut.programs,
        *(*norm.running, norm.batches, norm.weight, norm.bias, norm.priors, parts, index, found),
        (*(norm.pooled or (0, 0)), norm.eps, norm.momentum, *cut.numbers),
        BATCH=batched,
        SORTED=ordered,
        **cut.blocks,
    )
    return found


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    """See `normswap.functional.context.ContextGlue` for the formulas."""
    x, (norm, cut, index, batched, note) = inputs[0], given
    tables = _make_tables(x, norm, cut, index, True, batched)
    if note is not None:
        used, values, _ = _moments(tables, cut)
        note(Moments(*(t[:-1] for t in used)), count(values[:-1].unsqueeze(1)))
    if norm.moved is None:
        y = sweeps.affine_of(x, tables, index, cut.size, cut.numbers[2])
    else:
        p, y = plan(x), torch.empty_like(x)
        launch(
            cn_kernels.apply_and_move,
            p.programs,
            *(x, y, tables, index, *norm.moved, norm.batches, cut.rows[2:]),
            **p.blocks,
        )
    return y, norm.priors, index, tables


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    (x, weight, bias), (priors, index, tables) = inputs, kept
    norm, cut, _, batched, _ = given
    p, dy = plan(x), kernels.match(dy, x)
    instances, size, _, channels, _, splits, _ = cut.numbers
    moves = needed[0] and (batched or norm.weighs)
    dx = torch.empty_like(x) if needed[0] else None
    room = 2 * channels * (instances * splits + (size if moves else 0))
    found = x.new_empty(room, dtype=torch.float32)
    over_x = (tables, index, cut.rows)
    launch(tile.dots, p.programs, dy, x, None if moves else dx, found, *over_x, **p.blocks)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    launch(
        cn_kernels.pull,
        cut.programs,
        *(found, index, tables, weight, bias, priors, dweight, dbias),
        (*(norm.pooled or (0, 0)), norm.eps, *cut.numbers[:-1]),
        MOVES=moves,
        WEIGHED=norm.weighs,
        **cut.blocks,
    )
    if moves:
        launch(tile.combine, p.programs, dy, x, dx, found, None, *over_x, **p.blocks)
    return dx, dweight, dbias


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (priors, index, tables), (norm, cut, _, batched, _) = kept, given
    used, _, known = _moments(tables, cut)
    norm = norm._replace(priors=priors, running=used)
    x, weight, bias = inputs
    return norm_by_formula(x, weight, bias, norm, known, index[: len(x)], batched)


_WAY = Way(_forward, _backward, _formula)


def _moments(tables: Tensor, cut: Cut) -> tuple[Moments, Tensor, Moments | None]:
    """Return the moments that were used, (K + 1, C), their number of values, and those compared."""
    contexts, channels = cut.numbers[2:4]
    size = (contexts + 1) * channels
    rest = tables[3 * cut.size * channels :]
    used = Moments(*(t.view(-1, channels) for t in (tables[:size], rest[size : 2 * size])))
    values = rest[2 * size :][: contexts + 1]
    known = rest[2 * (size + _line(contexts)) :][: 2 * contexts * channels]
    compared = Moments(*known.view(2, contexts, channels)) if len(known) else None
    return used, values, compared
