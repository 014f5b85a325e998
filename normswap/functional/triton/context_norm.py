"""CN by Triton's kernels: three launches forward in training, three backward; two in evaluation.

One more in evaluation where samples without a label weigh the contexts, for their moments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.affine import Centred, centre_norm
from normswap.functional.moments import Moments, context_posterior, instance_moments
from normswap.functional.norm_contexts import norm_contexts
from normswap.functional.segments import Counts, count
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton.cn_launches import Forward, backward_of, forward_of, line
from normswap.functional.triton.launching import launches_for
from normswap.functional.triton.plan import Cut, cut_tables, plan
from normswap.functional.triton.recording import Operator, Tensors, record
from normswap.functional.triton.sorting import expand_labels, find_rows, sort_labels
from normswap.functional.triton.sweeps import step_of


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
    if not batched and not records((x, norm.weight, norm.bias)):
        index = None
        if norm.weighs and labels is not None:
            index = labels = find_rows(labels.expand(instances), contexts)
        found, tables = _make_tables(x, norm, index, False, False, labels)
        y = torch.empty_like(x)
        found.apply(x, y, tables, labels)
        return y
    index = sort_labels(expand_labels(labels, x), contexts, norm.weighs)
    return record(_OPERATOR, (norm, index, batched, note), x, norm.weight, norm.bias)


def _make_tables(
    x: Tensor, norm: Norm, index: Tensor | None, ordered: bool, batched: bool, rows: Tensor | None
) -> tuple[Forward, Tensor]:
    """Return what to launch, and all tables; the index is as for `forward_of`.

    Rows are what the last launch is given, (N,) or (1,) or None; see `step_of`.
    """
    given = (*norm.running, norm.batches, norm.weight, norm.bias, norm.priors)
    what = (x.shape, x.is_contiguous(), norm.weight.shape[0], norm.pooled, norm.weighs)
    how = (batched, None if index is None else ordered, norm.moved is not None, step_of(rows))
    kinds = (x, *given, *(norm.moved or ()), *(() if rows is None else (rows,)))
    found = launches_for(kinds, forward_of, *what, (norm.eps, norm.momentum), *how)
    parts = None
    if batched or norm.weighs:
        parts = x.new_empty(found.parts, dtype=torch.float32)
        found.stats(x, parts, None if batched else index)
    tables = x.new_empty(found.values, dtype=torch.float32)
    found.tables(*given, parts, index, tables)
    return found, tables


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    """See `normswap.functional.norm_contexts.ContextGlue` for the formulas."""
    x, (norm, index, batched, note) = inputs[0], given
    found, tables = _make_tables(x, norm, index, True, batched, index)
    if note is not None:
        used, values, _ = _moments(tables, found.cut)
        note(Moments(*(t[:-1] for t in used)), count(values[:-1].unsqueeze(1)))
    y = torch.empty_like(x)
    found.apply(x, y, tables, index, *(() if norm.moved is None else (*norm.moved, norm.batches)))
    return y, norm.priors, index, tables


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    (x, weight, bias), (priors, index, tables) = inputs, kept
    norm, _, batched, _ = given
    dy, moves = kernels.match(dy, x), needed[0] and (batched or norm.weighs)
    what = (x.shape, x.is_contiguous(), weight.shape[0], norm.pooled, norm.weighs, norm.eps)
    kinds = (x, dy, weight, bias, priors, index, tables)
    start = launches_for(kinds, backward_of, *what, needed[0], moves)
    dx = torch.empty_like(x) if needed[0] else None
    found = x.new_empty(start.values, dtype=torch.float32)
    start.dots(dy, x, None if moves else dx, found, tables, index)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    start.gradients(found, index, tables, weight, bias, priors, dweight, dbias)
    if moves:
        start.combine(dy, x, dx, found, None, tables, index)
    return dx, dweight, dbias


def _moments(tables: Tensor, cut: Cut) -> tuple[Moments, Tensor, Moments | None]:
    """Return the moments that were used, (K + 1, C), their number of values, and those compared."""
    rows, contexts, channels = cut.numbers[1:4]
    size = (contexts + 1) * channels
    rest = tables[3 * rows * channels :]
    used = Moments(*(t.view(-1, channels) for t in (tables[:size], rest[size : 2 * size])))
    values = rest[2 * size :][: contexts + 1]
    known = rest[2 * (size + line(contexts)) :][: 2 * contexts * channels]
    compared = Moments(*known.view(2, contexts, channels)) if len(known) else None
    return used, values, compared


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x, weight, bias), (priors, index, tables), (norm, _, batched, _) = inputs, kept, given
    contexts, labels = len(weight), index[: len(x)]
    used, _, known = _moments(tables, cut_tables(plan(x), contexts, False, norm.weighs))
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
        return norm_contexts(x, labels, gain, shift, *rest, override=mix)
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


_OPERATOR = Operator(_forward, _backward, _formula)
