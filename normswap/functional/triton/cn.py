"""CN by Triton's kernels: three launches forward in training, three backward; two in evaluation.

One more in evaluation where samples without a label weigh the contexts, for their moments.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional import context, kernels
from normswap.functional.affine import Centred, centre_norm
from normswap.functional.moments import Moments, context_posterior, instance_moments
from normswap.functional.segments import Counts, count
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton import cn_kernels, sweeps, tile
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import cut_contexts, cut_rows, plan
from normswap.functional.triton.recording import Tensors, Way, record
from normswap.functional.triton.sorting import find_rows, sort_labels


class Norm(NamedTuple):
    """What a layer of CN holds.

    Attributes:
        weight, bias, priors: (K, C), (K, C) and (K,).
        running: moments, (K, C), of contexts with fewer than two values in the batch.
        moved: the running moments that this batch is to move; None for none.
        batches: how many moved them, (K,).
        eps: added to the variance.
        momentum: None for the average of all batches.
        pooled: which contexts, from and to, are pooled for samples without a label; (0, 0) where
            there must be none, None where the host knows that there is none.
        weighs: whether samples without a label, instead, weigh the contexts, each for itself.
    """

    weight: Tensor
    bias: Tensor
    priors: Tensor
    running: Moments
    moved: Moments | None
    batches: Tensor
    eps: float
    momentum: float | None
    pooled: tuple[int, int] | None
    weighs: bool


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


@lru_cache(maxsize=4096)
def _cut(
    instances: int, geometry: tuple[int, ...], contexts: int, pools: bool, weighs: bool
) -> Cut:
    channels, positions, *_, splits, part = geometry
    programs, blocks = cut_rows(contexts + pools, channels)
    rows, values = contexts + 1, 2 * (contexts + 1) * channels + 2 * _line(contexts)
    if weighs:
        rows, values = contexts + instances, values + contexts * (2 * channels + instances)
        programs += instances
    numbers = (instances, rows, contexts, channels, positions, splits, part)
    blocks |= cut_contexts(contexts, channels) if weighs else {"KP": 0, "WN": 1, "WC": 1}
    over_x = (None, None, rows, contexts, *geometry)
    return Cut(values + 3 * rows * channels, numbers, over_x, blocks, programs)


def _line(contexts: int) -> int:
    return (contexts + 16) // 16 * 16


def context_norm(
    x: Tensor, labels: Tensor | None, norm: Norm, batched: bool, note: Callable[..., None] | None
) -> Tensor:
    """Return x normalised with the moments of each instance's context.

    Args:
        x: (N, C, *).
        labels: (N,) in [-1, K); or (1,), that of all; None where all are -1.
        norm: see there.
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
        return sweeps.affine_of(x, tables, labels, cut.numbers[1], contexts)
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    index = sort_labels(labels.expand(instances), contexts, norm.weighs)
    return record(_WAY, (norm, cut, index, batched, note), x, norm.weight, norm.bias)


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
        cn_kernels.tables, cut.programs, *norm.running, norm.batches, norm.weight, norm.bias,
        norm.priors, parts, index, found,
        (*(norm.pooled or (0, 0)), norm.eps, norm.momentum, *cut.numbers),
        BATCH=batched, SORTED=ordered, **cut.blocks,
    )  # fmt: skip
    return found


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    """See `normswap.functional.context.ContextGlue` for the formulas."""
    x, (norm, cut, index, batched, note) = inputs[0], given
    tables = _make_tables(x, norm, cut, index, True, batched)
    if note is not None:
        used, values, _ = _moments(tables, cut)
        note(Moments(*(t[:-1] for t in used)), count(values[:-1].unsqueeze(1)))
    if norm.moved is None:
        y = sweeps.affine_of(x, tables, index, *cut.numbers[1:3])
    else:
        p, y = plan(x), torch.empty_like(x)
        moved = (*norm.moved, norm.batches, cut.rows[2:])
        launch(cn_kernels.apply_and_move, p.programs, x, y, tables, index, *moved, **p.blocks)
    return y, norm.priors, index, tables


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    (x, weight, bias), (priors, index, tables) = inputs, kept
    norm, cut, _, batched, _ = given
    p, dy = plan(x), kernels.match(dy, x)
    instances, rows, _, channels, _, splits, _ = cut.numbers
    moves = needed[0] and (batched or norm.weighs)
    dx = torch.empty_like(x) if needed[0] else None
    room = 2 * channels * (instances * splits + (rows if moves else 0))
    found = x.new_empty(room, dtype=torch.float32)
    over_x = (tables, index, cut.rows)
    launch(tile.dots, p.programs, dy, x, None if moves else dx, found, *over_x, **p.blocks)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    launch(
        cn_kernels.pull, cut.programs, found, index, tables, weight, bias, priors, dweight, dbias,
        (*(norm.pooled or (0, 0)), norm.eps, *cut.numbers[:-1]),
        MOVES=moves, WEIGHED=norm.weighs, **cut.blocks,
    )  # fmt: skip
    if moves:
        launch(tile.combine, p.programs, dy, x, dx, found, None, *over_x, **p.blocks)
    return dx, dweight, dbias


def _moments(tables: Tensor, cut: Cut) -> tuple[Moments, Tensor, Moments | None]:
    """Return the moments that were used, (K + 1, C), their number of values, and those compared."""
    rows, contexts, channels = cut.numbers[1:4]
    size = (contexts + 1) * channels
    rest = tables[3 * rows * channels :]
    used = Moments(*(t.view(-1, channels) for t in (tables[:size], rest[size : 2 * size])))
    values = rest[2 * size :][: contexts + 1]
    known = rest[2 * (size + _line(contexts)) :][: 2 * contexts * channels]
    compared = Moments(*known.view(2, contexts, channels)) if len(known) else None
    return used, values, compared


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x, weight, bias), (priors, index, tables), (norm, cut, _, batched, _) = inputs, kept, given
    contexts, (used, _, known), labels = len(weight), _moments(tables, cut), index[: len(x)]
    dtype, (low, high) = used.mean.dtype, norm.pooled or (0, contexts)
    priors = priors.to(dtype).unsqueeze(1)
    share = priors[low:high] / priors[low:high].sum()
    affine = (t.to(dtype) * priors.rsqrt() for t in (weight, bias))
    gain, shift = (torch.cat((t, (share * t[low:high]).sum(0, keepdim=True))) for t in affine)
    labels = torch.where(labels < 0, contexts, labels).clamp(max=contexts)
    mix = None
    if known is not None:
        # Nothing has written row K of what was used.
        pairs = zip(used, known, strict=True)
        used = Moments(*(torch.cat((t[:contexts], row[:1])) for t, row in pairs))
        mix = partial(_mix, labels, known, priors.squeeze(1), norm.eps)
    if batched:
        rest = (torch.ones_like(gain[:, :1]), used, contexts, norm.eps, _ignore)
        return context.norm_contexts(x, labels, gain, shift, *rest, override=mix)
    table = centre_norm(used, gain, shift, norm.eps)
    if mix is None:
        return apply_centred(x, table, labels)
    return apply_centred(x, mix(table.rows(labels), instance_moments(x), gain, shift))


def _mix(
    labels: Tensor, known: Moments, priors: Tensor, eps: float,
    table: Centred, instances: Moments, gain: Tensor, shift: Tensor,
) -> Centred:  # fmt: skip
    """Give samples without a label, whose index is K, the map that their weights mix."""
    contexts = len(priors)
    weights = context_posterior(instances, known, priors, eps)
    mixed = centre_norm(known, gain[:contexts], shift[:contexts], eps).mix(weights)
    return table.where(labels < contexts, mixed)


def _ignore(used: Moments, counts: Counts) -> None:
    """Note nothing: a derivative moves no statistics."""


_WAY = Way(_forward, _backward, _formula)
