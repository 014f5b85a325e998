"""The kernels of a mixture that assigns each value on its own; `mixture_norm` launches them.

What a program's tiles leave is added up value by value, and reduced once, to a row of parts
(P, sums, K, C); parts are added in a fixed order, without atomics.
"""

import triton
import triton.language as tl

from normswap.functional.triton import mixture_tile as mt
from normswap.functional.triton.parts import load_f64

_TINY = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def masses(
    x, part, logits, mu, log_sigma, least, most,
    C, M, sn, sm, sc, T, TILES, P,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``o, sum tau, sum tau (x - o), sum tau (x - o)^2`` of each component, (P, 4, K, C).

    The origin o is the mean of what it owns of the program's first tile, so that nothing cancels.
    """
    p, c, within = mt.locate(C, sm, sc, BM, BC)
    tables = mt.densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP)
    at, ok = mt.find(p, c, C, M, T, sn, sm, BM)
    v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
    tau, _ = mt.shares(v, ok, tables)
    # Something of each value, as a component may own nothing of it.
    near = tau + tl.where(ok, 1e-6, 0.0)[None]
    mass = tl.maximum(tl.sum(near, 1, keep_dims=True), _TINY)
    origin = tl.sum(near * v, 1, keep_dims=True) / mass
    mass, first, second = tl.zeros_like(tau), tl.zeros_like(tau), tl.zeros_like(tau)
    for j in range(p, TILES, P):
        at, ok = mt.find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        tau, _ = mt.shares(v, ok, tables)
        d = v - origin
        owned = tau * d
        mass += tau
        first += owned
        second += owned * d
    mt.keep(part, p, 4, (origin, mass, first, second), c, C, K, KP)


@triton.jit(do_not_specialize=["P"])
def settle(
    part, used, mu, log_sigma, least, most, mean, var, batches, momentum, factor,
    C, P, UPDATE: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add up what `masses` wrote, and settle the moments."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    at, ok = mt.cells(c, C, K, KP)
    mass = tl.zeros([KP, BM, BC], tl.float64)
    first, second = tl.zeros_like(mass), tl.zeros_like(mass)
    for i in range(0, P, BM):
        p = (i + tl.arange(0, BM))[None, :, None]
        row, there = part + p * 4 * K * C + at, ok & (p < P)
        # In float64 no digits that float32 has are lost to a mean that is large against the spread.
        o, w = load_f64(row, 0, there), load_f64(row, K * C, there)
        one, two = load_f64(row, 2 * K * C, there), load_f64(row, 3 * K * C, there)
        mass += w
        first += w * o + one
        second += (w * o + 2 * one) * o + two
    sums, given = (mass, first, second), (mu, log_sigma, mean, var, batches)
    mt.settle_moments(sums, used, given, least, most, momentum, factor, c, C, UPDATE, K, KP)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def mix(
    x, y, used, batches, weight, bias, logits, mu, log_sigma, least, most, eps,
    C, M, sn, sm, sc, T, TILES, P, UPDATE: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write y; with UPDATE count the batch, which `settle` read a launch before."""
    p, c, within = mt.locate(C, sm, sc, BM, BC)
    tables = mt.densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP)
    m, gain, root = mt.gains(used, weight, tables[7], eps, c, C, K, KP)
    a, b = gain * root, mt.table(bias, c, c < C, 0.0)[None]
    for j in range(p, TILES, P):
        at, ok = mt.find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        tau, _ = mt.shares(v, ok, tables)
        found = tl.sum(tau * (a * (v - m)), 0) + b
        tl.store(y + at + within, found, ok)
    if UPDATE:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def gradient_sums(
    x, dy, part, used, logits, mu, log_sigma, least, most,
    C, M, sn, sm, sc, T, TILES, P,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``sum dy tau_k`` and ``sum dy tau_k (x - m_k)``, (P, 2, K, C)."""
    p, c, within = mt.locate(C, sm, sc, BM, BC)
    tables = mt.densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP)
    cell, there = mt.cells(c, C, K, KP)
    m = tl.load(used + K * C + cell, there, 0.0)
    first, second = tl.zeros([KP, BM, BC], tl.float32), tl.zeros([KP, BM, BC], tl.float32)
    for j in range(p, TILES, P):
        at, ok = mt.find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        g = tl.load(dy + at + within, ok, 0.0).to(tl.float32)[None]
        tau, _ = mt.shares(v, ok, tables)
        owned = tau * g
        first += owned
        second += owned * (v - m)
    mt.keep(part, p, 2, (first, second), c, C, K, KP)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def differentiate(
    x, dy, dx, sums, part, used, weight, logits, mu, log_sigma, least, most, eps,
    C, M, sn, sm, sc, T, TILES, P,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write dx, and the sums of dl_k, dl_k z_k and dl_k z_k^2, (P, 3, K, C).

    Each program adds up what all left of `gradient_sums`: P is small, and a launch would cost more.
    """
    p, c, within = mt.locate(C, sm, sc, BM, BC)
    tables = mt.densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP)
    inverse = tables[2]
    m, gain, root = mt.gains(used, weight, tables[7], eps, c, C, K, KP)
    a = gain * root
    cell, there = mt.cells(c, C, K, KP)
    mass = tl.load(used + cell, there, 0.0)
    # Through the batch's moments; the running ones have no gradient, and no part in that of x.
    share = tl.where(mass >= mt.MASS, -a / tl.maximum(mass, mt.MASS), 0.0)
    by_mean = share * mt.total(sums, 0, 2, P, c, C, BM, K, KP)
    by_var = 0.5 * share * root * root * mt.total(sums, 1, 2, P, c, C, BM, K, KP)
    constant = by_var * tl.load(used + 2 * K * C + cell, there, 0.0)
    zeroth = tl.zeros([KP, BM, BC], tl.float32)
    first, second = tl.zeros_like(zeroth), tl.zeros_like(zeroth)
    for j in range(p, TILES, P):
        at, ok = mt.find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        g = tl.load(dy + at + within, ok, 0.0).to(tl.float32)[None]
        tau, z = mt.shares(v, ok, tables)
        d = v - m
        slope = g * a + by_mean + by_var * d
        dtau = slope * d - constant
        dlogit = tau * (dtau - tl.sum(tau * dtau, 0, keep_dims=True))
        dlogit_z = dlogit * z
        found = tl.sum(tau * (slope + by_var * d) - dlogit_z * inverse, 0)
        tl.store(dx + at + within, found, ok)
        zeroth += dlogit
        first += dlogit_z
        second += dlogit_z * z
    mt.keep(part, p, 3, (zeroth, first, second), c, C, K, KP)


@triton.jit(do_not_specialize=["P"])
def finish(
    sums, part, used, weight, logits, log_sigma, least, most, eps,
    dweight, dbias, dlogits, dmu, dlog_sigma, C, P, LEARNED: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the parameters. LEARNED: m and v are mu and sigma^2."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = (
        mt.total(sums, 0, 2, P, c, C, BM, K, KP),
        mt.total(sums, 1, 2, P, c, C, BM, K, KP),
        mt.total(part, 0, 3, P, c, C, BM, K, KP),
        mt.total(part, 1, 3, P, c, C, BM, K, KP),
        mt.total(part, 2, 3, P, c, C, BM, K, KP),
    )
    tables = (used, weight, logits, log_sigma)
    targets = (dweight, dbias, dlogits, dmu, dlog_sigma)
    mt.write_gradients(total, tables, targets, least, most, eps, c, C, LEARNED, FLOOR, K, KP)
