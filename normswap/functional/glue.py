"""Glue whose derivative is written out: contexts, style exchange.

Glue makes a map of each instance from the instances' statistics; all its tensors are small. Any
differentiable function will do (see `normswap.functional.fused`), but autograd takes as long for
some thirty small operators as batch norm does for a late layer of a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional.affine import Affine
from normswap.functional.moments import Moments, pick_rows, segment_sum, wide_dtype


class Pull(NamedTuple):
    """What a loss's gradient by x is, besides ``dy * scale``: ``spread * (x - mean) + constant``.

    Attributes:
        spread: (N, C).
        constant: (N, C).
        tensors: gradients of the tensors given to the glue.
    """

    spread: Tensor
    constant: Tensor
    tensors: tuple[Tensor | None, ...]


class ContextGlue:
    """CN: the moments of each context, by the law of total variance, and its affine.

    With r = (V_k + eps)^-1/2 and A = gain r: s = A, t = bias + (m - mu_k) A. Backward, with
    D1 = sum dt and D2 = sum [ds + dt (m - mu_k)] over the instances of a context, of L values:
    dbias = D1, dgain = r D2, dx = A dy - A (r^2 D2 (x - mu_k) + D1) / L. A context whose moments
    are given, not the batch's, has no last term.

    Args:
        index: (N,) in [0, K).
        size: values of a channel of an instance.
        given: (K, C), used for contexts with fewer than two values.
        batched: contexts that are normalised with the batch at all; the first so many.
        eps: added to the variance.
        note: called with the moments each context is normalised with and its number of values,
            (K, 1).
    """

    def __init__(
        self,
        index: Tensor,
        size: int,
        given: Moments,
        batched: int,
        eps: float,
        note: Callable[[Moments, Tensor], None],
    ) -> None:
        self.index, self.size, self.given = index, size, given
        self.batched, self.eps, self.note = batched, eps, note

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Affine, Any]:
        """Return the map of each instance, and what `backward` needs."""
        gain, bias = tensors
        index, dtype, wide = self.index, gain.dtype, wide_dtype(gain)
        contexts = gain.shape[0]
        # Segments are summed in order: float32 would lose digits as the batch grows.
        mean, var = (t.to(wide) for t in instances)
        values = segment_sum(mean.new_full((len(index), 1), self.size), index, contexts)
        if self.batched < contexts:
            values[self.batched :] = 0
        share = values.clamp(min=1).reciprocal()
        weight = share * self.size
        mu = segment_sum(mean, index, contexts).mul_(weight)
        off = mean - pick_rows(mu, index)
        var = segment_sum(torch.addcmul(var, off, off), index, contexts).mul_(weight)
        usable = values > 1
        mu = torch.where(usable, mu.to(dtype), self.given.mean)
        var = torch.where(usable, var.to(dtype), self.given.var)
        values, share = values.to(dtype), (share * usable).to(dtype)
        self.note(Moments(mu, var), values)
        inverse = var.add(self.eps).rsqrt_()
        scale = gain * inverse
        rows = pick_rows(scale, index)
        off = instances.mean - pick_rows(mu, index)
        affine = Affine(rows, torch.addcmul(pick_rows(bias, index), off, rows))
        return affine, (scale, inverse, off, share)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> Pull:
        """Return the gradients, given those of scale and shift."""
        scale, inverse, off, share = saved
        index, contexts = self.index, scale.shape[0]
        dbias = segment_sum(dshift, index, contexts)
        dgain = segment_sum(torch.addcmul(dscale, off, dshift), index, contexts).mul_(inverse)
        minus = scale * share.neg()
        spread = pick_rows(minus * inverse * dgain, index)
        constant = torch.addcmul(pick_rows(minus * dbias, index), spread, off)
        return Pull(spread, constant, (dgain, dbias))


class ExchangeGlue:
    """CrossNorm: s = sd[permutation] / sd, t = mean[permutation]; sd = sqrt(var M/(M-1) + eps).

    Args:
        permutation: of instances or of channels.
        axis: 0 for instances, 1 for channels.
        positions: M, at least 2.
        eps: added to the variance, under the root.
    """

    def __init__(self, permutation: Tensor, axis: int, positions: int, eps: float) -> None:
        self.permutation, self.axis, self.positions = permutation, axis, positions
        self.eps = eps

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Affine, Any]:
        """Return the map of each instance, and what `backward` needs."""
        mean, var = instances
        std = var.mul(self.positions / (self.positions - 1)).add_(self.eps).sqrt_()
        scale = std.index_select(self.axis, self.permutation).div_(std)
        shift = mean.index_select(self.axis, self.permutation)
        return Affine(scale, shift), (std, scale)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> Pull:
        """Return the gradients, given those of scale and shift."""
        std, scale = saved
        by_std = dscale / std
        spread = torch.empty_like(std).index_copy_(self.axis, self.permutation, by_std)
        spread.addcmul_(by_std, scale, value=-1).div_(std).div_(self.positions - 1)
        mean = torch.empty_like(std).index_copy_(self.axis, self.permutation, dshift)
        constant = mean.addcmul_(scale, dshift, value=-1).div_(self.positions)
        return Pull(spread, constant, ())
