"""ACN by Triton where a channel of an instance is assigned as a whole: glue between four passes.

A program takes BC channels and all instances, BN at a time, whose moments it adds up from those
of parts. Tiles are (KP, BN, BC), as those of `mixture_tile`. Formulas: `InstanceMixtureGlue`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.mixture_start import PRIOR_FLOOR, log_sigma_bounds
from normswap.functional.triton import mixture_tile as mt
from normswap.functional.triton import sweeps
from normswap.functional.triton.gate import add, merge, rows
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import cut_instances, pow2
from normswap.functional.triton.recording import Tensors


@triton.jit(do_not_specialize=["N", "M", "S"])
def assign(
    part_mean, part_var, centre, squares, scale, shift, used,
    weight, bias, logits, mu, log_sigma, mean, var, batches, least, most, momentum, factor, eps,
    N, C, M, S, PART, BATCH: tl.constexpr, UPDATE: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BN: tl.constexpr, SB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write mean, variance, and scale and shift of the map about the mean, all (N, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    tables = mt.densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP)
    mass = tl.zeros([KP, 1, BC], tl.float64)
    first, second = tl.zeros_like(mass), tl.zeros_like(mass)
    if BATCH:
        for i in range(0, N, BN):
            m, q = merge(part_mean, part_var, i, c, N, C, M, S, PART, BN, SB)
            tau, _ = mt.shares(m.to(tl.float32)[None], rows(i, c, N, C, BN)[1], tables)
            owned = tau.to(tl.float64)
            mass += tl.sum(owned, 1, keep_dims=True)
            first += tl.sum(owned * m[None], 1, keep_dims=True)
            second += tl.sum(owned * (q / M + m * m)[None], 1, keep_dims=True)
    given = (mu, log_sigma, mean, var, batches)
    centres, variances = mt.settle_moments(
        (mass, first, second), used, given, least, most, momentum, factor, c, C, UPDATE, K, KP
    )
    if UPDATE and momentum is not None:
        # Else the programs read it.
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)
    gain = mt.table(weight, c, c < C, 0.0)[None, None] * tl.exp(-0.5 * tables[7])
    a = gain / tl.sqrt(variances + eps)
    for i in range(0, N, BN):
        m, q = merge(part_mean, part_var, i, c, N, C, M, S, PART, BN, SB)
        at, ok = rows(i, c, N, C, BN)
        m = m.to(tl.float32)
        tau, _ = mt.shares(m[None], ok, tables)
        tl.store(centre + at, m, ok)
        tl.store(squares + at, (q / M).to(tl.float32), ok)
        tl.store(scale + at, tl.sum(tau * a, 0), ok)
        offset = tl.sum(tau * a * (m[None] - centres), 0) + mt.table(bias, c, c < C, 0.0)[None]
        tl.store(shift + at, offset, ok)


@triton.jit
def gradient_sums(first, second, centre, used, i, c, N, C, S, K, KP, BN, SB):
    """Return sum dy, m - M_k and sum dy (x - M_k) of BN instances."""
    one, two = add(first, second, i, c, N, C, S, BN, SB)
    at, ok = rows(i, c, N, C, BN)
    cell, there = mt.cells(c, C, K, KP)
    off = mt.table(centre, at, ok, 0.0)[None] - mt.table(used, K * C + cell, there, 0.0)
    one = one.to(tl.float32)[None]
    return one, off, two.to(tl.float32)[None] + one * off


@triton.jit(do_not_specialize=["N", "M", "S"])
def differentiate(
    first, second, centre, squares, used, weight, logits, mu, log_sigma, least, most, eps,
    spread, constant, dweight, dbias, dlogits, dmu, dlog_sigma,
    N, C, M, S, LEARNED: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BN: tl.constexpr, SB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write spread and constant of a `GlueGradient`, and the gradients of the parameters."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    tables = mt.densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP)
    _m, gain, root = mt.gains(used, weight, tables[7], eps, c, C, K, KP)
    a = gain * root
    total, along = tl.zeros([KP, 1, BC], tl.float32), tl.zeros([KP, 1, BC], tl.float32)
    for i in range(0, N, BN):
        at, ok = rows(i, c, N, C, BN)
        tau, _ = mt.shares(mt.table(centre, at, ok, 0.0)[None], ok, tables)
        one, _, q = gradient_sums(first, second, centre, used, i, c, N, C, S, K, KP, BN, SB)
        total += tl.sum(tau * one, 1, keep_dims=True)
        along += tl.sum(tau * q, 1, keep_dims=True)
    cell, there = mt.cells(c, C, K, KP)
    mass, v = mt.table(used, cell, there, 0.0), mt.table(used, 2 * K * C + cell, there, 0.0)
    # Through the batch's moments; the running ones have no gradient.
    share = tl.where(mass >= mt.MASS, -a / tl.maximum(mass, mt.MASS), 0.0)
    by_mean, by_var = share * total, 0.5 * share * root * root * along
    zeroth, once, twice = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
    for i in range(0, N, BN):
        at, ok = rows(i, c, N, C, BN)
        tau, z = mt.shares(mt.table(centre, at, ok, 0.0)[None], ok, tables)
        one, off, q = gradient_sums(first, second, centre, used, i, c, N, C, S, K, KP, BN, SB)
        slope = by_mean + by_var * off
        dtau = a * q + slope * off + by_var * (mt.table(squares, at, ok, 0.0)[None] - v)
        dlogit = tau * (dtau - tl.sum(tau * dtau, 0, keep_dims=True))
        dlogit_z = dlogit * z
        found = tl.sum(tau * (slope + by_var * off) - dlogit_z * tables[2], 0)
        tl.store(spread + at, tl.sum(tau * by_var, 0) * 2 / M, ok)
        tl.store(constant + at, found / M, ok)
        zeroth += tl.sum(dlogit, 1, keep_dims=True)
        once += tl.sum(dlogit_z, 1, keep_dims=True)
        twice += tl.sum(dlogit_z * z, 1, keep_dims=True)
    sums, given = (total, along, zeroth, once, twice), (used, weight, logits, log_sigma)
    targets = (dweight, dbias, dlogits, dmu, dlog_sigma)
    mt.write_gradients(sums, given, targets, least, most, eps, c, C, LEARNED, FLOOR, K, KP)


def forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    """Return y, the moments that components are normalised with, and a table of instances."""
    (x, *parameters), (running, settings) = inputs, given
    count = len(parameters[3])
    programs, sizes, blocks = cut_instances(x, 4, count)
    mean, var, batches = running or (None, None, None)
    used = x.new_empty(3, *parameters[3].shape, dtype=torch.float32)
    kept, shift = used.new_empty(3, *x.shape[:2]), used.new_empty(x.shape[:2])
    number = sizes[0] * sizes[2]
    launch(
        assign, programs, *sweeps.part_stats(x).unbind(), *kept, shift, used, *parameters,
        mean, var, batches, *log_sigma_bounds(settings.eps), settings.momentum,
        number / max(number - 1, 1), settings.eps if running else 0.0, *sizes,
        BATCH=settings.batch, UPDATE=settings.update,
        FLOOR=PRIOR_FLOOR, K=count, KP=pow2(count), **blocks,
    )  # fmt: skip
    if batches is not None and settings.update and settings.momentum is None:
        batches.add_(1)
    return sweeps.affine(x, kept[2], shift, kept[0]), used, kept


def backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    """Return the gradients of inputs, given what `forward` returned besides y."""
    (x, weight, _, *assigned), (running, settings) = inputs, given
    used, (centre, squares, scale) = kept
    count, dy = used.shape[1], kernels.match(dy, x)
    programs, sizes, blocks = cut_instances(x, 4, count)
    spread, constant = torch.empty_like(scale), torch.empty_like(scale)
    found = [torch.empty_like(t) for t in inputs[1:]]
    launch(
        differentiate, programs, *sweeps.part_dots(dy, x, centre)[1].unbind(), centre, squares,
        used, weight, *assigned, *log_sigma_bounds(settings.eps),
        settings.eps if running else 0.0, spread, constant, *found, *sizes[:-1],
        LEARNED=running is None, FLOOR=PRIOR_FLOOR, K=count, KP=pow2(count), **blocks,
    )  # fmt: skip
    return [sweeps.combine(dy, x, scale, spread, constant, centre), *found]
