"""The one map every method ends in, as tables: scale and shift per instance and channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.moments import Moments, pick_rows, pool_moments, wide_dtype


class Centred(NamedTuple):
    """``y = (x - centre) * scale + shift``; the shape of all is (rows, C).

    Gradients lose no digits to a mean that is large against the spread, as they would through
    ``shift - centre * scale``.
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor

    def rows(self, index: Tensor) -> "Centred":
        """Return the rows that `index` (N,) names, (N, C)."""
        return Centred(*(pick_rows(t, index) for t in self))

    def at(self, mean: Tensor) -> "Affine":
        """Return scale and shift of the same map written as ``(x - mean) * scale + shift``."""
        return Affine(self.scale, torch.addcmul(self.shift, mean - self.centre, self.scale))

    def where(self, condition: Tensor, other: "Centred") -> "Centred":
        """Keep the rows where `condition` (N,) holds, take the others from `other`."""
        mask = condition.unsqueeze(1)
        return Centred(*(torch.where(mask, a, b) for a, b in zip(self, other, strict=True)))

    def mix(self, weights: Tensor) -> "Centred":
        """Return the rows mixed by weights (N, K), each row of which sums to one."""
        wide, dtype = wide_dtype(weights), self.scale.dtype
        weights, (centre, scale, shift) = weights.to(wide), (t.to(wide) for t in self)
        mixed = Affine(scale, shift - centre * scale).mix(weights)
        near = (weights @ centre).detach().to(dtype)
        shift = torch.addcmul(mixed.shift, near.to(wide), mixed.scale)
        return Centred(near, mixed.scale.to(dtype), shift.to(dtype))


class Affine(NamedTuple):
    """Scale and shift; the shape of both is (rows, C)."""

    scale: Tensor
    shift: Tensor

    def rows(self, index: Tensor) -> "Affine":
        """Return the rows that `index` (N,) names, (N, C)."""
        return Affine(*(pick_rows(t, index) for t in self))

    def mix(self, weights: Tensor) -> "Affine":
        """Return the rows mixed by weights (N, K), each row of which sums to one."""
        wide = wide_dtype(weights)
        scale, shift = ((weights.to(wide) @ t.to(wide)).to(t.dtype) for t in self)
        return Affine(scale, shift)

    def where(self, condition: Tensor, other: "Affine") -> "Affine":
        """Keep the rows where `condition` (N,) holds, take the others from `other`."""
        mask = condition.unsqueeze(1)
        return Affine(*(torch.where(mask, a, b) for a, b in zip(self, other, strict=True)))

    def centred(self) -> Centred:
        """Return the same map, centred on zero."""
        return Centred(torch.zeros_like(self.shift), self.scale, self.shift)


def fold_norm(moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Affine:
    """Fold ``weight * (x - mean) / sqrt(var + eps) + bias`` into one scale and shift."""
    scale = weight * torch.rsqrt(moments.var + eps)
    return Affine(scale, bias - moments.mean * scale)


def centre_norm(moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Centred:
    """Return ``weight * (x - mean) / sqrt(var + eps) + bias`` as a map."""
    return Centred(moments.mean, weight * torch.rsqrt(moments.var + eps), bias)


def pool_norm(
    moments: Moments, priors: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Moments, Tensor]:
    """Return the moments and bias, (1, C), with which `centre_norm` is that of the pooled contexts.

    The bias makes up for what rounding leaves of the pooled mean: digits that count where it is
    large against the spread.
    """
    origin = moments.mean[:1].detach()
    offset, var = pool_moments(Moments(moments.mean - origin, moments.var), priors)
    mean = (origin + offset).detach()
    left = offset - (mean - origin)
    return Moments(mean, var), torch.addcmul(bias, left, weight * torch.rsqrt(var + eps), value=-1)
