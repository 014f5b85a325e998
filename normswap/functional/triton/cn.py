"""CN by Triton's kernels: three launches forward in training, three backward; two in evaluation.

One more each way for samples without a label that weigh the contexts, and then, in evaluation, one
for their moments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import kernels
from normswap.functional.moments import Moments
from normswap.functional.segments import count
from normswap.functional.tables import records
from normswap.functional.triton import cn_kernels, sweeps
from normswap.functional.triton.cn_formula import Norm as Norm
from normswap.functional.triton.cn_formula import differentiate
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Rows, plan
from normswap.functional.triton.posterior import Posterior, pull_weights, weigh
from normswap.functional.triton.sorting import SortedLabels, find_rows, sort_labels


class Tables(NamedTuple):
    """``y = (x - centre) * scale + shift`` for contexts and samples without a label, (K + 1, C).

    Where each of the latter has its own map, centre, scale and shift are (K + N, C).

    Attributes:
        centre: means.
        scale: see above.
        shift: see above.
        inverse: reciprocal standard deviations.
        var: variances.
        values: of a channel in the batch, (K + 1,); 0 where the moments are not the batch's.
        rates: how far the running moments are to move, (K + 1,).
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor
    inverse: Tensor
    var: Tensor
    values: Tensor
    rates: Tensor


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
    contexts = len(norm.weight)
    if not batched and not records((x, norm.weight, norm.bias)):
        if norm.weighs and labels is not None:
            labels = find_rows(labels.expand(len(x)), contexts)
        (centre, scale, shift, *_), _ = _make_tables(x, norm, labels, None, False)
        if labels is None:
            scale, shift, centre = scale[contexts:], shift[contexts:], centre[contexts:]
        return sweeps.affine(x, scale, shift, centre, labels)
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    labels = labels.expand(len(x))
    segments = sort_labels(labels, contexts)
    if norm.weighs:
        segments = segments._replace(labels=find_rows(labels, contexts))
    y: Tensor = _ContextNorm.apply(x, norm.weight, norm.bias, norm, segments, batched, note)
    return y


def _make_tables(
    x: Tensor, norm: Norm, index: Tensor | None, segments: SortedLabels | None, batched: bool
) -> tuple[Tables, Posterior | None]:
    p, (contexts, channels) = plan(x), norm.weight.shape
    wide, rows = torch.float32, contexts + (len(x) if norm.weighs else 1)
    found = Tables(
        *x.new_empty(3, rows, channels, dtype=wide).unbind(),
        *x.new_empty(2, contexts + 1, channels, dtype=wide).unbind(),
        *x.new_empty(2, contexts + 1, dtype=wide).unbind(),
    )
    parts = batch = known = None
    if batched:
        parts = batch = sweeps.part_stats(x)
    elif norm.weighs:
        parts = sweeps.part_stats(x, index, contexts)
    if norm.weighs and batched:
        known = Moments(*x.new_empty(2, contexts, channels, dtype=wide).unbind())
    order, offsets = (None, None) if segments is None else segments[1:]
    cut = Rows(contexts + (norm.pooled is not None), channels)
    launch(
        cn_kernels.tables,
        cut.programs,
        *(*norm.running, norm.batches, norm.weight, norm.bias, norm.priors),
        *(*(batch or (None, None)), order, offsets, *found[:-1]),
        *(found.rates if batched else None, *(known or (None, None))),
        *(norm.pooled or (0, 0)),
        *(norm.eps, norm.momentum, contexts, channels, p.shape[2], p.splits, p.part),
        **cut.blocks,
    )
    if not norm.weighs or parts is None:
        return found, None
    known = known or Moments(found.centre[:contexts], found.var[:contexts])
    return found, weigh(x, parts, index, known, norm, found[:3])


class _ContextNorm(Function):
    """See `normswap.functional.context.ContextGlue` for the formulas."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, norm, segments, batched, note = inputs
        contexts = len(weight)
        found, posterior = _make_tables(x, norm, segments.labels, segments, batched)
        centre, scale, shift, inverse, var, values, _ = found
        weights, known = posterior or (None, (None, None))
        ctx.norm, ctx.batched = norm, batched
        # All that depends on x is saved as tensors are: checkpointing computes all of it anew.
        ctx.save_for_backward(
            *(x, weight, bias, norm.priors, *segments),
            *(centre, scale, inverse, var, values, weights, *known),
        )
        if note is not None:
            used = Moments(centre[:contexts], var[:contexts])
            note(used, count(values[:contexts].unsqueeze(1)))
        if norm.moved is None:
            return sweeps.affine(x, scale, shift, centre, segments.labels)
        p, y = plan(x), torch.empty_like(x)
        tables, (index, si, _, stride) = sweeps.address(x, segments.labels, centre, scale, shift)
        launch(
            cn_kernels.apply_and_move,
            p.programs,
            *(x, y, *tables, index, si, contexts, stride),
            *(*norm.moved, norm.batches, var, values, found.rates),
            *p.geometry,
            **p.blocks,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, priors, index, order, offsets, *tables = ctx.saved_tensors
        centre, scale, inverse, var, values, weights, *known = tables
        needed = ctx.needs_input_grad[:3]
        norm = ctx.norm._replace(weight=weight, bias=bias, priors=priors)
        if torch.is_grad_enabled():
            norm = norm._replace(running=Moments(centre[: len(weight) + 1], var))
            given = Moments(*known) if norm.weighs else None
            found = differentiate(x, norm, given, index, ctx.batched, grads[0], needed)
            return *found, None, None, None, None
        p, (contexts, channels) = plan(x), weight.shape
        dy = kernels.match(grads[0], x)
        moves = needed[0] and (ctx.batched or norm.weighs)
        at_once = scale if needed[0] and not moves else None
        dx, first, second = sweeps.part_dots(dy, x, centre, at_once, index)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        spread, constant = torch.empty_like(scale), torch.empty_like(scale)
        cut = Rows(contexts + (norm.pooled is not None), channels)
        launch(
            cn_kernels.pull,
            cut.programs,
            *(first, second, order, offsets, inverse, scale, values, priors),
            *(weights, *known, centre if norm.weighs else None, dweight, dbias),
            *((spread, constant) if moves else (None, None)),
            *(*(norm.pooled or (0, 0)), norm.eps, contexts, channels, p.splits),
            **cut.blocks,
        )
        if moves:
            if norm.weighs:
                posterior = Posterior(weights, Moments(*known))
                dots, pulled = (first, second), (spread, constant)
                pull_weights(x, dots, index, posterior, norm, centre, pulled)
            dx = sweeps.combine(dy, x, scale, spread, constant, centre, index)
        return dx, dweight, dbias, None, None, None, None
