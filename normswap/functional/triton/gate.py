"""SelfNorm's gate as glue for Triton: a launch forward and one backward, between the passes.

A program takes BC channels and all instances, BN at a time, as the batch norm in the gate is over
them; it adds up what the passes over x left of SB parts at a time. In float64: these are few, and
a mean far from zero would cancel. What is stored narrower goes through float32.
"""

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normswap.functional.glue import GlueGradient, Map
from normswap.functional.moments import Moments
from normswap.functional.triton import sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.parts import load_f64
from normswap.functional.triton.plan import cut_instances

# Under the root in the gate's batch norm.
_EPS = tl.constexpr(1e-5)


@triton.jit
def rows(i, c, N, C, BN):
    """Return where BN instances lie in a table (N, C), and a mask."""
    n = i + tl.arange(0, BN)[:, None]
    return n * C + c[None, :], (n < N) & (c < C)[None, :]


@triton.jit
def parts(i, s, c, N, C, S, BN, SB):
    """Return where parts of BN instances lie in (N, S, C), which they are, and a mask."""
    n, part = i + tl.arange(0, BN)[:, None, None], s + tl.arange(0, SB)[None, :, None]
    c = c[None, None, :]
    return (n * S + part) * C + c, part, (n < N) & (part < S) & (c < C)


@triton.jit
def merge(mean, var, i, c, N, C, M, S, PART, BN, SB):
    """Return mean and sum of squares about it of BN instances."""
    one = tl.zeros([BN, c.shape[0]], tl.float64)
    two = tl.zeros([BN, c.shape[0]], tl.float64)
    for s in range(0, S, SB):
        at, part, ok = parts(i, s, c, N, C, S, BN, SB)
        size = tl.where(ok, tl.minimum(PART, M - part * PART), 0).to(tl.float64)
        m = load_f64(mean, at, ok)
        one += tl.sum(size * m, 1)
        two += tl.sum(size * (load_f64(var, at, ok) + m * m), 1)
    m = one / M
    return m, tl.maximum(two - one * m, 0.0)


@triton.jit
def add(first, second, i, c, N, C, S, BN, SB):
    """Return the sums of two tables (N, S, C) over the parts of BN instances."""
    one = tl.zeros([BN, c.shape[0]], tl.float64)
    two = tl.zeros([BN, c.shape[0]], tl.float64)
    for s in range(0, S, SB):
        at, _, ok = parts(i, s, c, N, C, S, BN, SB)
        one += tl.sum(load_f64(first, at, ok), 1)
        two += tl.sum(load_f64(second, at, ok), 1)
    return one, two


@triton.jit
def styles(mean, var, i, c, N, C, M, S, PART, eps, BN, SB):
    """Return mean and unbiased standard deviation of BN instances, of 0 on maps of one value."""
    m, squares = merge(mean, var, i, c, N, C, M, S, PART, BN, SB)
    return m, tl.where(M > 1, tl.sqrt(squares / tl.maximum(M - 1, 1) + eps), 0.0)


@triton.jit(do_not_specialize=["N", "M", "S"])
def gate(
    mean, var, weight, gain, bias, running_mean, running_var,
    found_mean, found_std, found, moments, momentum, height, eps,
    N, C, M, S, PART, BATCH: tl.constexpr, UPDATE: tl.constexpr,
    BN: tl.constexpr, SB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write mean, std and gate (N, C), and the mean and variance the batch norm used, (2, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    by_mean, by_std = load_f64(weight, 2 * c, there), load_f64(weight, 2 * c + 1, there)
    mu, v = load_f64(running_mean, c, there), load_f64(running_var, c, there)
    if BATCH:
        one, two = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
        for i in range(0, N, BN):
            m, std = styles(mean, var, i, c, N, C, M, S, PART, eps, BN, SB)
            z = tl.where(rows(i, c, N, C, BN)[1], by_mean[None] * m + by_std[None] * std, 0.0)
            one += tl.sum(z, 0)
            two += tl.sum(z * z, 0)
        old_mean, old_var = mu, v
        mu = one / N
        v = tl.maximum(two / N - mu * mu, 0.0)
        if UPDATE:
            new = old_mean + momentum * (mu - old_mean)
            tl.store(running_mean + c, new.to(tl.float32), there)
            new = old_var + momentum * (v * N / (N - 1) - old_var)
            tl.store(running_var + c, new.to(tl.float32), there)
    tl.store(moments + c, mu, there)
    tl.store(moments + C + c, v, there)
    slope = load_f64(gain, c, there) / tl.sqrt(v + _EPS)
    shift = load_f64(bias, c, there)
    for i in range(0, N, BN):
        m, std = styles(mean, var, i, c, N, C, M, S, PART, eps, BN, SB)
        z = by_mean[None] * m + by_std[None] * std
        out = ((z - mu[None]) * slope[None] + shift[None]).to(tl.float32)
        at, ok = rows(i, c, N, C, BN)
        tl.store(found_mean + at, m, ok)
        tl.store(found_std + at, std, ok)
        tl.store(found + at, height / (1.0 + tl.exp(-out)), ok)


@triton.jit
def gate_gradients(sums, tables, height, i, c, N, C, S, BN, SB):
    """Return the gradient by what the sigmoid is of, the normalised input, mean and std."""
    one, two = add(sums[0], sums[1], i, c, N, C, S, BN, SB)
    mean, std, found, moments, weight = tables
    at, ok = rows(i, c, N, C, BN)
    there, m, g = c < C, load_f64(mean, at, ok), load_f64(found, at, ok)
    deviation = load_f64(std, at, ok)
    by_mean, by_std = load_f64(weight, 2 * c, there), load_f64(weight, 2 * c + 1, there)
    z = by_mean[None] * m + by_std[None] * deviation
    root = 1.0 / tl.sqrt(load_f64(moments + C, c, there) + _EPS)
    normal = tl.where(ok, (z - load_f64(moments, c, there)[None]) * root[None], 0.0)
    return (two + one * m) * g * (1.0 - g / height), normal, m, deviation


@triton.jit(do_not_specialize=["N", "M", "S"])
def differentiate(
    first, second, mean, std, found, moments, weight, gain, dweight, dgain, dbias, spread, constant,
    height, N, C, M, S, BATCH: tl.constexpr,
    BN: tl.constexpr, SB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the parameters' gradients, and the spread and constant of a `GlueGradient`."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    sums, tables = (first, second), (mean, std, found, moments, weight)
    total, along = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
    for i in range(0, N, BN):
        dout, normal, _, _ = gate_gradients(sums, tables, height, i, c, N, C, S, BN, SB)
        total += tl.sum(dout, 0)
        along += tl.sum(dout * normal, 0)
    tl.store(dbias + c, total.to(tl.float32), there)
    tl.store(dgain + c, along.to(tl.float32), there)
    slope = load_f64(gain, c, there) / tl.sqrt(load_f64(moments + C, c, there) + _EPS)
    by_mean = load_f64(weight, 2 * c, there) / M
    by_std = tl.where(M > 1, load_f64(weight, 2 * c + 1, there) / tl.maximum(M - 1, 1), 0.0)
    one, two = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
    for i in range(0, N, BN):
        dz, normal, m, deviation = gate_gradients(sums, tables, height, i, c, N, C, S, BN, SB)
        at, ok = rows(i, c, N, C, BN)
        if BATCH:
            dz = tl.where(ok, dz - (total[None] + normal * along[None]) / N, 0.0)
        dz *= slope[None]
        one += tl.sum(dz * m, 0)
        two += tl.sum(dz * deviation, 0)
        by_square = by_std[None] * dz / tl.where(deviation > 0, deviation, 1.0)
        tl.store(spread + at, by_square, ok)
        tl.store(constant + at, by_mean[None] * dz, ok)
    tl.store(dweight + 2 * c, one.to(tl.float32), there)
    tl.store(dweight + 2 * c + 1, two.to(tl.float32), there)


# The passes over x, whose sums the glue adds up, so that no launch does.
_PASSES = SimpleNamespace(
    stats=lambda x: sweeps.part_stats(x).unbind(),
    dot=lambda dy, x, centre: sweeps.part_dots(dy, x, centre)[1].unbind(),
    affine=sweeps.affine,
    combine=sweeps.combine,
)


class GateGlue:
    """What `normswap.functional.glue.GateGlue` computes of x, given the moments of parts.

    With the batch norm's running mean and variance, (C,), which the batch's are to update or not.
    Settings are the gate's scale, what is under the root of std, and the batch norm's momentum.
    """

    passes = _PASSES

    def __init__(
        self, x: Tensor, running: tuple[Tensor, ...], batch: bool, update: bool, *settings: float
    ) -> None:
        self.programs, self.sizes, self.blocks = cut_instances(x, 8)
        self.running, self.batch, self.update = running, batch, update
        self.scale, self.eps, self.momentum = settings

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        mean, var = instances
        kept = mean.new_empty(3, *self.sizes[:2])
        used = mean.new_empty(2, self.sizes[1], dtype=torch.float64)
        launch(
            gate, self.programs, mean, var, *tensors, *self.running, *kept, used, self.momentum,
            self.scale, self.eps, *self.sizes, BATCH=self.batch, UPDATE=self.update, **self.blocks,
        )  # fmt: skip
        # Once: checkpointing may run this again, when others may have moved them.
        self.update = False
        if not self.batch:
            self.running = (used[0], used[1])
        return Map(kept[2], None, kept[0]), (kept, used, tensors)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Return the gradients, given ``sum dy * (x - mean)`` and ``sum dy`` of the parts."""
        kept, used, tensors = saved
        found = tuple(torch.empty_like(t) for t in tensors)
        spread, constant = kept.new_empty(2, *self.sizes[:2])
        launch(
            differentiate, self.programs, dshift, dscale, *kept, used, *tensors[:2], *found,
            spread, constant, self.scale, *self.sizes[:-1], BATCH=self.batch, **self.blocks,
        )  # fmt: skip
        return GlueGradient(spread, constant, found)
