"""Normalisation with the moments of each context in a batch: CN's training step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.functional.affine import Affine, Centred, centre_norm
from normswap.functional.glue import GlueGradient, Map
from normswap.functional.moments import (
    Moments,
    context_moments,
    pick_rows,
    segment_sum,
    shrink_moments,
    wide_dtype,
)
from normswap.functional.segments import Counts, Segments, count, segments
from normswap.functional.stat_maps import stat_affine

Note = Callable[[Moments, Counts], None]


def norm_contexts(
    x: Tensor,
    labels: Tensor,
    gain: Tensor,
    bias: Tensor,
    factor: Tensor,
    given: Moments,
    batched: int,
    eps: float,
    note: Note,
    reduce: Callable[[Tensor], Tensor] | None = None,
    override: Callable[[Centred, Moments, Tensor, Tensor], Centred] | None = None,
    shrink: float = 0.0,
) -> Tensor:
    """Return ``f_k [gain_k (x - mu_k) / sqrt(var_k + eps) + bias_k]`` with a context's own moments.

    Args:
        x: (N, C, *).
        labels: the context of each instance, (N,) int64, -1 for one more than are batched.
        gain: (K, C), as `bias`, in the dtype that statistics of x have.
        bias: see `gain`.
        factor: f, (K, 1), without a gradient.
        given: moments, (K, C), of contexts with fewer than two values in the batch, and of those
            that are not `batched`.
        batched: how many contexts, the first, are normalised with the moments of the batch.
        eps: added to the variance.
        note: called once with the moments each batched context is normalised with, and its
            number of values.
        reduce: sums over processes; see `context_moments`.
        override: from the map of each instance, the instances' moments, gain and bias, times
            their factor, to another map, centred anywhere.
        shrink: samples' worth of the whole batch in the moments of a context; see
            `shrink_moments`.
    """
    size, total = x.shape[2:].numel(), len(gain)

    def glue(instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
        # Instances of contexts that are not batched count nowhere.
        index = labels if total == batched else torch.where(labels < 0, batched, labels)
        values, batch = context_moments(instances, index, batched, size, reduce)
        counts = count(values.unsqueeze(1))
        if shrink:
            batch = shrink_moments(counts.values, batch, shrink * size)
        used = batch.where(counts.usable, Moments(*(old[:batched] for old in given)))
        if not replay:
            note(used, counts)
        if batched < len(given.mean):
            pairs = zip(used, given, strict=True)
            used = Moments(*(torch.cat((new, old[batched:])) for new, old in pairs))
        gain, bias = (t * factor for t in tensors)
        table = centre_norm(used, gain, bias, eps).rows(index)
        if override is not None:
            table = override(table, instances, gain, bias)
        return table.at(instances.mean)

    explicit: Callable[[], ContextGlue] | None = None
    if reduce is None and override is None and not shrink:

        def explicit() -> ContextGlue:
            found = segments(labels, batched, total, size, gain.dtype)
            return ContextGlue(found, factor, given, batched, eps, note)

    return stat_affine(x, glue, gain, bias, explicit=explicit)


@dataclass(eq=False)
class ContextGlue:
    """CN: the moments of each context, by the law of total variance, and its affine.

    With r = (V_k + eps)^-1/2 and A = f gain r: y = x A + f bias - mu_k A. Backward, with
    D1 = sum dy and D2 = sum dy (x - mu_k) over the instances of a context, of L values:
    dbias = f D1, dgain = f r D2, dx = A dy - A (r^2 D2 (x - mu_k) + D1) / L. A context whose
    moments are given, not the batch's, has no last term.

    Args:
        segments: the instances of each context.
        factor: f, (K, 1).
        given: (K, C), used for contexts with fewer than two values.
        batched: contexts that are normalised with the batch at all; the first so many.
        eps: added to the variance.
        note: see `norm_contexts`.
    """

    segments: Segments
    factor: Tensor
    given: Moments
    batched: int
    eps: float
    note: Note

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        gain, bias = (t * self.factor for t in tensors)
        index, counts, dtype = self.segments.rows, self.segments.counts, gain.dtype
        # Segments are summed in order: float32 would lose digits as the batch grows.
        wide = wide_dtype(gain)
        mu = self.segments.mean(instances.mean.to(wide)).to(dtype)
        mu = self._or_given(mu, self.given.mean)
        centre = pick_rows(mu, index)
        off = instances.mean - centre
        spread = torch.addcmul(instances.var, off, off).to(wide)
        var = self._or_given(self.segments.mean(spread).to(dtype), self.given.var)
        if self.batched == len(mu):
            self.note(Moments(mu, var), counts)
        else:
            first = slice(self.batched)
            self.note(Moments(mu[first], var[first]), count(counts.values[first]))
        inverse = var.add(self.eps).rsqrt_()
        scale = gain.mul_(inverse)
        offset = bias.addcmul_(mu, scale, value=-1)
        found = Map(pick_rows(scale, index), pick_rows(offset, index), centre)
        return found, (scale, inverse)

    def _or_given(self, found: Tensor, given: Tensor) -> Tensor:
        counts = self.segments.counts
        return found if counts.every else torch.where(counts.usable, found, given)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Return the gradients, given ``sum dy * (x - mu_k)`` and ``sum dy``."""
        scale, inverse = saved
        index, contexts = self.segments.rows, len(scale)
        dbias = segment_sum(dshift, index, contexts)
        dgain = segment_sum(dscale, index, contexts).mul_(inverse)
        minus = scale * self.segments.minus_share
        spread = (minus * inverse).mul_(dgain)
        constant = minus.mul_(dbias)
        tensors = (dgain.mul_(self.factor), dbias.mul_(self.factor))
        return GlueGradient(pick_rows(spread, index), pick_rows(constant, index), tensors)
