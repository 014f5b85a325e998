"""Glue whose derivative is written out, and one such: CrossNorm's exchange of styles.

Glue makes a map of each instance from the instances' statistics; all its tensors are small. Any
differentiable function will do (see `normswap.functional.fused`), but autograd takes as long for
some thirty small operators as batch norm does for a late layer of a model.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional.moments import Moments


class Map(NamedTuple):
    """``y = x * scale + offset``, and what its gradients are to be taken about.

    Attributes:
        scale: (N, C).
        offset: (N, C); None is 0.
        centre: (N, C), near the mean, so that ``sum dy * (x - centre)`` loses no digits to a mean
            that is large against the spread.
    """

    scale: Tensor
    offset: Tensor | None
    centre: Tensor


class Pull(NamedTuple):
    """A loss's gradient by x, besides ``dy * scale``: ``(x - centre) * spread + constant``.

    Attributes:
        spread: (N, C).
        constant: (N, C).
        tensors: gradients of the tensors given to the glue.
    """

    spread: Tensor
    constant: Tensor
    tensors: tuple[Tensor | None, ...]


@dataclass(eq=False)
class ExchangeGlue:
    """CrossNorm: s = sd[permutation] / sd, t = mean[permutation]; sd = sqrt(var M/(M-1) + eps).

    Args:
        permutation: of instances or of channels.
        axis: 0 for instances, 1 for channels.
        positions: M, at least 2.
        eps: added to the variance, under the root.
    """

    permutation: Tensor
    axis: int
    positions: int
    eps: float

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        mean, var = instances
        std = var.mul(self.positions / (self.positions - 1)).add_(self.eps).sqrt_()
        scale = std.index_select(self.axis, self.permutation).div_(std)
        shift = mean.index_select(self.axis, self.permutation)
        return Map(scale, shift.addcmul_(mean, scale, value=-1), mean), (std, scale)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> Pull:
        """Return the gradients, given ``sum dy * (x - centre)`` and ``sum dy``."""
        std, scale = saved
        by_std = dscale / std
        spread = torch.empty_like(std).index_copy_(self.axis, self.permutation, by_std)
        spread.addcmul_(by_std, scale, value=-1).div_(std).div_(self.positions - 1)
        dmean = torch.empty_like(std).index_copy_(self.axis, self.permutation, dshift)
        constant = dmean.addcmul_(scale, dshift, value=-1).div_(self.positions)
        return Pull(spread, constant, ())
