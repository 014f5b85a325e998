"""SelfNorm's gate as glue for Triton: a launch forward and one backward, between the passes."""

from typing import Any

import torch
from torch import Tensor

from normswap.functional.glue import Map, Pull
from normswap.functional.moments import Moments
from normswap.functional.triton import gate_kernels, sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import plan, power


class Parts:
    """The passes over x, whose sums the glue adds up, so that no launch does."""

    affine = staticmethod(sweeps.affine)
    combine = staticmethod(sweeps.combine)

    @staticmethod
    def stats(x: Tensor) -> Moments:
        """Return mean and variance of the parts, (N, S, C)."""
        return Moments(*sweeps.part_stats(x).unbind())

    @staticmethod
    def dot(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sum dy`` and ``sum dy * (x - centre)`` of the parts, (N, S, C)."""
        first, second = sweeps.part_dots(dy, x, centre)[1].unbind()
        return first, second


class GateGlue:
    """What `normswap.functional.glue.GateGlue` computes, of the moments of parts.

    Args:
        x: what the gate is of.
        running: mean and variance, (C,), of the gate's batch norm.
        batch: whether that uses the statistics of this batch.
        update: whether these move the running ones.
        scale: of the gate.
        eps: under the root of std.
        momentum: of the batch norm.
    """

    passes = Parts

    def __init__(
        self,
        x: Tensor,
        running: tuple[Tensor, Tensor],
        batch: bool,
        update: bool,
        scale: float,
        eps: float,
        momentum: float,
    ) -> None:
        cut = plan(x)
        self.shape, self.split = cut.shape, (cut.splits, cut.part)
        self.running, self.batch, self.update = running, batch, update
        self.scale, self.eps, self.momentum = scale, eps, momentum
        channels, parts = self.shape[1], min(power(cut.splits), 32)
        blocks = {"SB": parts, "BN": min(64 // parts, power(len(x))), "BC": min(8, power(channels))}
        self.blocks, self.programs = blocks, -(-channels // blocks["BC"])

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        mean, var = instances
        kept = mean.new_empty(3, *self.shape[:2])
        used = mean.new_empty(2, self.shape[1], dtype=torch.float64)
        launch(
            gate_kernels.gate,
            self.programs,
            *(mean, var, *tensors, *self.running, *kept, used),
            *(self.momentum, self.scale, self.eps, *self.shape, *self.split),
            BATCH=self.batch,
            UPDATE=self.update,
            **self.blocks,
        )
        # Once: checkpointing may run this again, when others may have moved them.
        self.update = False
        if not self.batch:
            self.running = (used[0], used[1])
        return Map(kept[2], None, kept[0]), (kept, used, tensors)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> Pull:
        """Return the gradients, given ``sum dy * (x - mean)`` and ``sum dy`` of the parts."""
        kept, used, tensors = saved
        found = tuple(torch.empty_like(t) for t in tensors)
        spread, constant = kept.new_empty(2, *self.shape[:2])
        launch(
            gate_kernels.differentiate,
            self.programs,
            *(dshift, dscale, *kept, used, *tensors[:2], *found, spread, constant),
            *(self.scale, *self.shape, self.split[0]),
            BATCH=self.batch,
            **self.blocks,
        )
        return Pull(spread, constant, found)
