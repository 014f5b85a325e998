"""The one map every method ends in: ``y = x * s + t``, with s and t per instance and channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.moments import Moments, compute_dtype, wide_dtype


class Affine(NamedTuple):
    """Scale and shift; the shape of both is (rows, C)."""

    scale: Tensor
    shift: Tensor

    def rows(self, index: Tensor) -> "Affine":
        """Return the rows that `index` (N,) names, (N, C)."""
        return Affine(self.scale.index_select(0, index), self.shift.index_select(0, index))

    def mix(self, weights: Tensor) -> "Affine":
        """Return the rows mixed by weights (N, K), each row of which sums to one."""
        wide = wide_dtype(weights)
        scale, shift = ((weights.to(wide) @ t.to(wide)).to(t.dtype) for t in self)
        return Affine(scale, shift)


def fold_norm(moments: Moments, weight: Tensor, bias: Tensor, eps: float) -> Affine:
    """Fold ``weight * (x - mean) / sqrt(var + eps) + bias`` into one scale and shift."""
    scale = weight * torch.rsqrt(moments.var + eps)
    return Affine(scale, bias - moments.mean * scale)


def apply_affine(x: Tensor, affine: Affine) -> Tensor:
    """Return ``x * scale + shift`` in the dtype and memory format of x.

    Shape:
        x: (N, C, *); scale, shift: (N, C), or (1, C) for all instances.
    """
    shape = affine.scale.shape + (1,) * (x.dim() - 2)
    dtype = compute_dtype(x)
    scale, shift = (t.to(dtype).reshape(shape) for t in affine)
    return torch.addcmul(shift, x.to(dtype), scale).to(x.dtype)


def where_rows(condition: Tensor, first: Affine, second: Affine) -> Affine:
    """Choose each row from `first` where `condition` (N,) holds, else from `second`."""
    condition = condition.unsqueeze(1)
    return Affine(
        torch.where(condition, first.scale, second.scale),
        torch.where(condition, first.shift, second.shift),
    )
