"""CN by Triton's kernels: three launches forward in training, three backward; two in evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import context, kernels
from normswap.functional.affine import centre_norm
from normswap.functional.moments import Moments
from normswap.functional.segments import Counts, count
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton import cn_kernels, sweeps
from normswap.functional.triton.plan import Rows, launch, plan
from normswap.functional.triton.segments import Segments, find_segments


class Norm(NamedTuple):
    """What a layer of CN holds.

    Attributes:
        weight: (K, C).
        bias: (K, C).
        priors: (K,).
        running: moments, (K, C), of contexts with fewer than two values in the batch.
        moved: the running moments that this batch is to move; None for none.
        batches: how many moved them, (K,).
        eps: added to the variance.
        momentum: None for the average of all batches.
        pooled: which contexts, from and to, are pooled for samples without a label; (0, 0) where
            there must be none, None where the host knows that there is none.
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


class Tables(NamedTuple):
    """``y = (x - centre) * scale + shift`` for contexts and samples without a label, (K + 1, C).

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
        found = _make_tables(x, norm, None, None)
        scale, shift, centre = found.scale, found.shift, found.centre
        if labels is None:
            scale, shift, centre = scale[contexts:], shift[contexts:], centre[contexts:]
        return sweeps.affine(x, scale, shift, centre, labels)
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    segments = find_segments(labels.expand(len(x)), contexts)
    y: Tensor = _ContextNorm.apply(x, norm.weight, norm.bias, norm, segments, batched, note)
    return y


def _make_tables(x: Tensor, norm: Norm, parts: Moments | None, segments: Segments | None) -> Tables:
    p, (contexts, channels) = plan(x), norm.weight.shape
    wide = torch.float32
    found = Tables(
        *x.new_empty(5, contexts + 1, channels, dtype=wide).unbind(),
        *x.new_empty(2, contexts + 1, dtype=wide).unbind(),
    )
    order, offsets = (None, None) if segments is None else segments[1:]
    cut = Rows(contexts + (norm.pooled is not None), channels)
    launch(
        cn_kernels.tables,
        cut.programs,
        *(*norm.running, norm.batches, norm.weight, norm.bias, norm.priors),
        *(*((None, None) if parts is None else parts), order, offsets),
        *found[:-1],
        None if parts is None else found.rates,
        *(norm.pooled or (0, 0)),
        *(norm.eps, norm.momentum, contexts, channels, p.shape[2], p.splits, p.part),
        **cut.blocks,
    )
    return found


class _ContextNorm(Function):
    """See `normswap.functional.context.ContextGlue` for the formulas."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, norm, segments, batched, note = inputs
        parts = sweeps.part_stats(x) if batched else None
        found = _make_tables(x, norm, parts, segments)
        centre, scale, shift, inverse, var, values, _ = found
        ctx.norm, ctx.batched = norm, batched
        # All that depends on x is saved as tensors are: checkpointing computes all of it anew.
        ctx.save_for_backward(
            x, weight, bias, norm.priors, *segments, centre, scale, inverse, var, values
        )
        if note is not None:
            note(Moments(centre[:-1], var[:-1]), count(values[:-1].unsqueeze(1)))
        if norm.moved is None:
            return sweeps.affine(x, scale, shift, centre, segments.labels)
        p, y = plan(x), torch.empty_like(x)
        tables, rows = sweeps.address(x, segments.labels, centre, scale, shift)
        launch(
            cn_kernels.apply_and_move,
            p.programs,
            *(x, y, *tables, *rows),
            *(*norm.moved, norm.batches, var, values, found.rates),
            *p.geometry,
            **p.blocks,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, priors, index, order, offsets, *tables = ctx.saved_tensors
        centre, scale, inverse, var, values = tables
        needed, norm = ctx.needs_input_grad[:3], ctx.norm
        if torch.is_grad_enabled():
            norm = norm._replace(weight=weight, bias=bias, priors=priors)
            norm = norm._replace(running=Moments(centre, var))
            found = _differentiate(x, norm, index, ctx.batched, grads[0], needed)
            return *found, None, None, None, None
        p, (contexts, channels) = plan(x), weight.shape
        dy = kernels.match(grads[0], x)
        at_once = scale if needed[0] and not ctx.batched else None
        dx, first, second = sweeps.part_dots(dy, x, centre, at_once, index)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        spread, constant = torch.empty_like(scale), torch.empty_like(scale)
        cut, moves = Rows(contexts + 1, channels), needed[0] and ctx.batched
        launch(
            cn_kernels.pull,
            cut.programs,
            *(first, second, order, offsets, inverse, scale, values, priors, dweight, dbias),
            *((spread, constant) if moves else (None, None)),
            *(*(norm.pooled or (0, 0)), contexts, channels, p.splits),
            **cut.blocks,
        )
        if moves:
            dx = sweeps.combine(dy, x, scale, spread, constant, centre, index)
        return dx, dweight, dbias, None, None, None, None


def _differentiate(
    x: Tensor,
    norm: Norm,
    labels: Tensor,
    batched: bool,
    dy: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients with a graph of their own, for second derivatives.

    ``norm.running`` has the moments that were used, (K + 1, C).
    """
    # As views: of inputs that depend on each other, each is to be held fixed for the others.
    x, weight, bias = (t.view_as(t) for t in (x, norm.weight, norm.bias))
    contexts, dtype = len(weight), norm.running.mean.dtype
    priors = norm.priors.to(dtype).unsqueeze(1)
    low, high = norm.pooled or (0, contexts)
    share = priors[low:high] / priors[low:high].sum()
    with torch.autocast(x.device.type, enabled=False):
        gain, shift = (t.to(dtype) * priors.rsqrt() for t in (weight, bias))
        gain, shift = (
            torch.cat((t, (share * t[low:high]).sum(0, keepdim=True))) for t in (gain, shift)
        )
        index = torch.where(labels < 0, contexts, labels)
        if batched:
            used, eps, one = norm.running, norm.eps, torch.ones_like(gain[:, :1])
            y = context.norm_contexts(x, index, gain, shift, one, used, contexts, eps, _ignore)
        else:
            y = apply_centred(x, centre_norm(norm.running, gain, shift, norm.eps), index)
    wanted = [t for t, need in zip((x, weight, bias), needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _ignore(used: Moments, counts: Counts) -> None:
    """Note nothing: a derivative moves no statistics."""
