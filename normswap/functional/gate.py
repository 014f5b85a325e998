"""SelfNorm's gate as glue with its derivative written out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.functional.glue import Map, Pull
from normswap.functional.moments import Moments

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

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> Pull:
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
        return Pull(spread, constant, tuple(found))
