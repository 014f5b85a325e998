"""Glue whose derivative is written out: CrossNorm's exchange of styles, SelfNorm's gate.

Glue makes a map of each instance from the instances' statistics; all its tensors are small. Any
differentiable function will do (see `normswap.functional.stat_maps`), but autograd takes as long
for some thirty small operators as batch norm does for a late layer of a model.
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


class GlueGradient(NamedTuple):
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

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Return the gradients, given ``sum dy * (x - centre)`` and ``sum dy``."""
        std, scale = saved
        by_std = dscale / std
        spread = torch.empty_like(std).index_copy_(self.axis, self.permutation, by_std)
        spread.addcmul_(by_std, scale, value=-1).div_(std).div_(self.positions - 1)
        dmean = torch.empty_like(std).index_copy_(self.axis, self.permutation, dshift)
        constant = dmean.addcmul_(scale, dshift, value=-1).div_(self.positions)
        return GlueGradient(spread, constant, ())


_batch_norm: Any = torch.ops.aten.native_batch_norm
_batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward
_sigmoid_backward: Any = torch.ops.aten.sigmoid_backward


@dataclass(eq=False)
class GateGlue:
    """One gate: ``y = g * x`` with ``g = scale * sigmoid(BN(w1 * mean + w2 * std))``.

    The BN and its input are in float64, as a mean far from zero would cancel. Backward, with dz the
    gradient of the BN's input: dg = sum dy x; std = sqrt(var M / (M - 1) + eps), 0 where M is 1.

    Args:
        positions: M.
        running: of the BN, copies in float64.
        batch: whether the BN uses the statistics of this batch.
        kept: the running statistics, to be updated, or nothing.
        scale: of the gate.
        eps: under the root of std.
        momentum: of the BN.
    """

    positions: int
    running: tuple[Tensor, Tensor]
    batch: bool
    kept: tuple[Tensor, ...]
    scale: float
    eps: float
    momentum: float = 0.1

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        mean, var = instances
        wide = self.running[0].dtype
        if self.positions > 1:
            std = var.mul(self.positions / (self.positions - 1)).add_(self.eps).sqrt_()
        else:
            std = torch.zeros_like(var)
        weight, gain, bias = (t.to(wide) for t in tensors)
        by_mean, by_std = weight.T.contiguous()
        styles = mean.to(wide), std.to(wide)
        z = (by_mean * styles[0]).addcmul_(by_std, styles[1])
        out, *saved = _batch_norm(z, gain, bias, *self.running, self.batch, self.momentum, 1e-5)
        # Once: checkpointing may run this again, with what it computed anew.
        kept, self.kept = self.kept, ()
        for buffer, new in zip(kept, self.running, strict=False):
            buffer.copy_(new)
        sigmoid = out.to(mean.dtype).sigmoid_()
        g = sigmoid * self.scale
        return Map(g, None, mean), (mean, std, styles, weight, gain, z, sigmoid, saved, tensors)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Return the gradients, given ``sum dy * (x - mean)`` and ``sum dy``."""
        mean, std, styles, weight, gain, z, sigmoid, statistics, tensors = saved
        dg = torch.addcmul(dscale, dshift, mean).mul_(self.scale)
        dout = _sigmoid_backward(dg, sigmoid).to(z.dtype)
        running = (None, None) if self.batch else self.running
        dz, dgain, dbias = _batch_norm_backward(
            dout, z, gain, *running, *statistics, self.batch, 1e-5, [True, True, True]
        )
        dweight = torch.stack([(dz * t).sum(0) for t in styles], 1)
        found = (t.to(p.dtype) for t, p in zip((dweight, dgain, dbias), tensors, strict=True))
        dz = dz.to(mean.dtype)
        by_mean, by_std = weight.T.to(mean.dtype).contiguous()
        constant = dz * (by_mean / self.positions)
        if self.positions > 1:
            spread = dz.mul_(by_std / (self.positions - 1)).div_(std)
        else:
            spread = torch.zeros_like(dz)
        return GlueGradient(spread, constant, tuple(found))
