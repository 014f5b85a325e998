"""Normalisation with the moments of each context in a batch: CN's training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.functional.affine import Affine, Centred, centre_norm
from normswap.functional.fused import stat_affine
from normswap.functional.glue import Map, Pull
from normswap.functional.moments import (
    Moments,
    context_moments,
    pick_rows,
    segment_sum,
    shrink_moments,
    wide_dtype,
)

Note = Callable[[Moments, Tensor], None]


def norm_contexts(
    x: Tensor,
    index: Tensor,
    gain: Tensor,
    bias: Tensor,
    given: Moments,
    batched: int,
    eps: float,
    note: Note,
    reduce: Callable[[Tensor], Tensor] | None = None,
    override: Callable[[Centred, Moments, Tensor, Tensor], Centred] | None = None,
    shrink: float = 0.0,
) -> Tensor:
    """Return ``gain_k (x - mu_k) / sqrt(var_k + eps) + bias_k`` with each context's own moments.

    Args:
        x: (N, C, *).
        index: the context of each instance, (N,) int64 in [0, K).
        gain: (K, C), as `bias`, in the dtype that statistics of x have.
        bias: see `gain`.
        given: moments, (K, C), of contexts with fewer than two values in the batch, and of those
            that are not `batched`.
        batched: how many contexts, the first, are normalised with the moments of the batch.
        eps: added to the variance.
        note: called once with the moments each batched context is normalised with, and its
            number of values, (batched, 1).
        reduce: sums over processes; see `context_moments`.
        override: from the map of each instance, the instances' moments, gain and bias to another
            map, centred anywhere.
        shrink: samples' worth of the whole batch in the moments of a context; see
            `shrink_moments`.
    """
    size = x.shape[2:].numel()

    def glue(instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
        # Instances of contexts that are not batched count nowhere.
        rows = index.clamp(max=batched)
        values, batch = context_moments(instances, rows, batched, size, reduce)
        values = values.unsqueeze(1)
        if shrink:
            batch = shrink_moments(values, batch, shrink * size)
        pairs = zip(batch, given, strict=True)
        used = Moments(*(torch.where(values > 1, new, old[:batched]) for new, old in pairs))
        if not replay:
            note(used, values)
        if batched < len(given.mean):
            pairs = zip(used, given, strict=True)
            used = Moments(*(torch.cat((new, old[batched:])) for new, old in pairs))
        table = centre_norm(used, tensors[0], tensors[1], eps).rows(index)
        if override is not None:
            table = override(table, instances, tensors[0], tensors[1])
        return table.at(instances.mean)

    hand = None
    if reduce is None and override is None and not shrink:
        hand = partial(ContextGlue, index, size, given, batched, eps, note)
    return stat_affine(x, glue, gain, bias, hand=hand)


class ContextGlue:
    """CN: the moments of each context, by the law of total variance, and its affine.

    With r = (V_k + eps)^-1/2 and A = gain r: y = x A + bias - mu_k A. Backward, with D1 = sum dy
    and D2 = sum dy (x - mu_k) over the instances of a context, of L values: dbias = D1,
    dgain = r D2, dx = A dy - A (r^2 D2 (x - mu_k) + D1) / L. A context whose moments are given,
    not the batch's, has no last term.

    Args:
        index: (N,) in [0, K).
        size: values of a channel of an instance.
        given: (K, C), used for contexts with fewer than two values.
        batched: contexts that are normalised with the batch at all; the first so many.
        eps: added to the variance.
        note: see `norm_contexts`.
    """

    def __init__(
        self,
        index: Tensor,
        size: int,
        given: Moments,
        batched: int,
        eps: float,
        note: Note,
    ) -> None:
        self.index, self.size, self.given = index, size, given
        self.batched, self.eps, self.note = batched, eps, note

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        gain, bias = tensors
        index, dtype, wide = self.index, gain.dtype, wide_dtype(gain)
        contexts = gain.shape[0]
        # Segments are summed in order: float32 would lose digits as the batch grows.
        mean = instances.mean.to(wide)
        counts = segment_sum(mean.new_ones(len(index), 1), index, contexts)
        if self.batched < contexts:
            counts[self.batched :] = 0
        weight = counts.clamp(min=1).reciprocal_()
        values = counts.to(dtype).mul_(self.size)
        usable = values > 1
        mu = segment_sum(mean, index, contexts).mul_(weight)
        mu = torch.where(usable, mu.to(dtype), self.given.mean)
        centre = pick_rows(mu, index)
        off = instances.mean - centre
        spread = torch.addcmul(instances.var, off, off).to(wide)
        var = segment_sum(spread, index, contexts).mul_(weight)
        var = torch.where(usable, var.to(dtype), self.given.var)
        count = self.batched
        self.note(Moments(mu[:count], var[:count]), values[:count])
        inverse = var.add(self.eps).rsqrt_()
        scale = gain * inverse
        offset = torch.addcmul(bias, mu, scale, value=-1)
        found = Map(pick_rows(scale, index), pick_rows(offset, index), centre)
        return found, (scale, inverse, usable / values.clamp(min=1))

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> Pull:
        """Return the gradients, given ``sum dy * (x - mu_k)`` and ``sum dy``."""
        scale, inverse, share = saved
        index, contexts = self.index, scale.shape[0]
        dbias = segment_sum(dshift, index, contexts)
        dgain = segment_sum(dscale, index, contexts).mul_(inverse)
        minus = scale * share.neg()
        spread = (minus * inverse).mul_(dgain)
        constant = minus * dbias
        return Pull(pick_rows(spread, index), pick_rows(constant, index), (dgain, dbias))
