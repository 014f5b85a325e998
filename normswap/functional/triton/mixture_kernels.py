"""The kernels of a mixture that assigns each value on its own; `mixture` launches them.

A program takes BC channels and every P-th tile of BM positions, whatever instance it is of: tables
(K, C) are the same for all. Tiles are (KP, BM, BC), components first, which a thread has all of:
sums over components need no exchange. What a tile leaves is added up value by value; one
reduction at the end leaves a row (P, sums, K, C), in a fixed order. KP is the power of two not below K.

With e = x - mu_0 and z_k = (x - mu_k) / sigma_k, logits are differences to the first component's:
``z_k^2 - z_0^2 = (z_k - z_0) (z_k + z_0)``, where ``z_k - z_0 = e (1 / sigma_k - 1 / sigma_0) + off_k``
is exactly zero for components that are alike, whatever the compiler fuses. In powers of two.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_MASS = tl.constexpr(1e-3)
_TINY = tl.constexpr(1e-30)


@triton.jit
def place(C, sc, P, BM: tl.constexpr, BC: tl.constexpr, sm):
    """Return this program's number among those of its channels, the channels, and offsets in a tile."""
    width = tl.cdiv(C, BC)
    first = tl.program_id(0) % width * BC
    column = tl.arange(0, BC)
    within = tl.arange(0, BM)[:, None] * sm + column[None, :] * sc
    return tl.program_id(0) // width, first + column, first.to(tl.int64) * sc + within


@triton.jit
def find(j, c, C, M, T, sn, sm, BM: tl.constexpr):
    """Return where tile j of the T an instance has begins, and which of it are values."""
    n, i = j // T, j % T * BM
    ok = (i + tl.arange(0, BM) < M)[:, None] & (c < C)[None, :]
    return n.to(tl.int64) * sn + i.to(tl.int64) * sm, ok


@triton.jit
def table(pointer, at, ok, other):
    """Return a table in float32."""
    return tl.load(pointer + at, ok, other).to(tl.float32)


@triton.jit
def cells(c, C, K: tl.constexpr, KP: tl.constexpr):
    """Return where the channels' part of a table (K, C) lies, (KP, 1, BC), and a mask."""
    k, c = tl.arange(0, KP)[:, None, None], c[None, None, :]
    return k * C + c, (k < K) & (c < C)


@triton.jit
def priors(logits, c, C, FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Return the softmax of logits and log lambda; see `mixture_start.bounded_log_prior`."""
    at, ok = cells(c, C, K, KP)
    there = tl.arange(0, KP)[:, None, None] < K
    raw = tl.where(there, table(logits, at, ok, 0.0), float("-inf"))
    odds = tl.exp(raw - tl.max(raw, 0, keep_dims=True))
    share = odds / tl.sum(odds, 0, keep_dims=True)
    return share, tl.where(there, tl.log(FLOOR / K + (1 - FLOOR) * share), 0.0)


@triton.jit
def spread(log_sigma, at, ok, low, high):
    """Return log sigma within its bounds."""
    return tl.minimum(tl.maximum(table(log_sigma, at, ok, 0.0), low), high)


@triton.jit
def densities(logits, mu, log_sigma, low, high, c, C, FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):  # fmt: skip
    """Return the tables that `shares` reads: mu_0, 1 / sigma_0, 1 / sigma, off, and the logits'."""
    at, ok = cells(c, C, K, KP)
    _, log_prior = priors(logits, c, C, FLOOR, K, KP)
    ls, first = spread(log_sigma, at, ok, low, high), c[None, None, :]
    inverse, one = tl.exp(-ls), tl.exp(-spread(log_sigma, first, first < C, low, high))
    centre = table(mu, first, first < C, 0.0)
    off = (centre - table(mu, at, ok, 0.0)) * inverse
    constant = tl.where(tl.arange(0, KP)[:, None, None] < K, log_prior - ls, float("-inf"))
    half: tl.constexpr = -0.5 * _LOG2E
    return centre, one, inverse, off, (inverse - one) * half, off * half, constant * _LOG2E


@triton.jit
def shares(v, ok, tables):
    """Return tau, zero where there is no value, and z, both (KP, BM, BC), of values (1, BM, BC)."""
    centre, one, inverse, off, slope, rise, constant = tables
    e = v - centre
    z = e * inverse + off
    logit = (e * slope + rise) * (z + e * one) + constant
    odds = tl.exp2(logit - tl.max(logit, 0, keep_dims=True))
    return odds * tl.where(ok[None], 1.0 / tl.sum(odds, 0, keep_dims=True), 0.0), z


@triton.jit
def total(part, row, rows, P, c, C, BM: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Return the sum of a row of the programs' parts, (KP, 1, BC)."""
    at, ok = cells(c, C, K, KP)
    found = tl.zeros([KP, BM, c.shape[0]], tl.float32)
    for i in range(0, P, BM):
        p = (i + tl.arange(0, BM))[None, :, None]
        # Not as wide reads: these would spread the components of a tile over threads.
        cell = tl.max_contiguous((p * rows + row) * K * C + at, [1, 1, 1])
        found += tl.load(part + cell, ok & (p < P), 0.0)
    return tl.sum(found, 1, keep_dims=True)


@triton.jit
def keep(part, p, row, rows, value, c, C, K: tl.constexpr, KP: tl.constexpr):
    """Write a row of this program's part."""
    at, ok = cells(c, C, K, KP)
    tl.store(part + (p * rows + row) * K * C + at, value, ok)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def masses(
    x, part, logits, mu, log_sigma, low, high,
    C, M, sn, sm, sc, T, TILES, P,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write what each component owns: its mass, mean, and sum of squares about that, (P, 3, K, C).

    Sums are about the mean of what it owns of the program's first tile, so that nothing cancels.
    """
    p, c, within = place(C, sc, P, BM, BC, sm)
    tables = densities(logits, mu, log_sigma, low, high, c, C, FLOOR, K, KP)
    at, ok = find(p, c, C, M, T, sn, sm, BM)
    v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
    tau, _ = shares(v, ok, tables)
    # Something of each value, as a component may own nothing of it.
    near = tau + tl.where(ok, 1e-6, 0.0)[None]
    mass = tl.maximum(tl.sum(near, 1, keep_dims=True), _TINY)
    origin = tl.sum(near * v, 1, keep_dims=True) / mass
    mass, first, second = tl.zeros_like(tau), tl.zeros_like(tau), tl.zeros_like(tau)
    for j in range(p, TILES, P):
        at, ok = find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        tau, _ = shares(v, ok, tables)
        d = v - origin
        owned = tau * d
        mass += tau
        first += owned
        second += owned * d
    mass, first = tl.sum(mass, 1, keep_dims=True), tl.sum(first, 1, keep_dims=True)
    off = first / tl.maximum(mass, _TINY)
    keep(part, p, 0, 3, mass, c, C, K, KP)
    keep(part, p, 1, 3, origin + off, c, C, K, KP)
    squares = tl.sum(second, 1, keep_dims=True) - off * first
    keep(part, p, 2, 3, tl.maximum(squares, 0.0), c, C, K, KP)


@triton.jit(do_not_specialize=["P"])
def settle(
    part, used, mu, log_sigma, low, high, mean, var, count, momentum, factor,
    C, P, UPDATE: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write mass, mean and variance that components are normalised with, (3, K, C).

    A component that owns less than a thousandth of a value takes the running mean and variance, or
    its own where there are none. With UPDATE the others move theirs: by momentum, or where that is
    None, as cumulative averages.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    at, ok = cells(c, C, K, KP)
    mass = tl.zeros([KP, BM, BC], tl.float64)
    first, second = tl.zeros_like(mass), tl.zeros_like(mass)
    for i in range(0, P, BM):
        p = (i + tl.arange(0, BM))[None, :, None]
        row, there = part + p * 3 * K * C + at, ok & (p < P)
        w = tl.load(row, there, 0.0).to(tl.float64)
        m = tl.load(row + K * C, there, 0.0).to(tl.float64)
        mass += w
        first += w * m
        # In float64 no digits that float32 has are lost to a mean that is large against the spread.
        second += tl.load(row + 2 * K * C, there, 0.0).to(tl.float64) + w * m * m
    owned = tl.sum(mass, 1, keep_dims=True)
    usable, share = owned >= _MASS, tl.maximum(owned, _MASS)
    batch = tl.sum(first, 1, keep_dims=True) / share
    squares = tl.sum(second, 1, keep_dims=True) / share - batch * batch
    if mean is None:
        m, v = table(mu, at, ok, 0.0), tl.exp(2 * spread(log_sigma, at, ok, low, high))
    else:
        m, v = table(mean, at, ok, 0.0), table(var, at, ok, 1.0)
    m_used = tl.where(usable, batch.to(tl.float32), m)
    v_used = tl.where(usable, tl.maximum(squares, 0.0).to(tl.float32), v)
    tl.store(used + at, owned.to(tl.float32), ok)
    tl.store(used + K * C + at, m_used, ok)
    tl.store(used + 2 * K * C + at, v_used, ok)
    if UPDATE:
        if momentum is None:
            rate = 1.0 / (tl.load(count) + 1).to(tl.float32)
        else:
            rate = momentum
        mine = ok & usable
        tl.store(mean + at, (m + rate * (m_used - m)).to(mean.dtype.element_ty), mine)
        tl.store(var + at, (v + rate * (v_used * factor - v)).to(var.dtype.element_ty), mine)


@triton.jit
def gains(used, weight, log_prior, eps, c, C, K: tl.constexpr, KP: tl.constexpr):
    """Return m, gain and 1 / sqrt(v + eps) of the components."""
    at, ok = cells(c, C, K, KP)
    gain = table(weight, c, c < C, 0.0)[None, None] * tl.exp(-0.5 * log_prior)
    v = tl.load(used + 2 * K * C + at, ok, 1.0)
    return tl.load(used + K * C + at, ok, 0.0), gain, 1.0 / tl.sqrt(v + eps)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def mix(
    x, y, used, count, weight, bias, logits, mu, log_sigma, low, high, eps,
    C, M, sn, sm, sc, T, TILES, P, UPDATE: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write y; with UPDATE count the batch, which `settle` read a launch before."""
    p, c, within = place(C, sc, P, BM, BC, sm)
    tables = densities(logits, mu, log_sigma, low, high, c, C, FLOOR, K, KP)
    m, gain, root = gains(used, weight, priors(logits, c, C, FLOOR, K, KP)[1], eps, c, C, K, KP)
    a, b = gain * root, table(bias, c, c < C, 0.0)[None]
    for j in range(p, TILES, P):
        at, ok = find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        tau, _ = shares(v, ok, tables)
        found = tl.sum(tau * (a * (v - m)), 0) + b
        tl.store(y + at + within, found.to(y.dtype.element_ty), ok)
    if UPDATE:
        if tl.program_id(0) == 0:
            tl.store(count, tl.load(count) + 1)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def pulls(
    x, dy, part, used, logits, mu, log_sigma, low, high,
    C, M, sn, sm, sc, T, TILES, P,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``sum dy tau_k`` and ``sum dy tau_k (x - m_k)``, (P, 2, K, C)."""
    p, c, within = place(C, sc, P, BM, BC, sm)
    tables = densities(logits, mu, log_sigma, low, high, c, C, FLOOR, K, KP)
    cell, there = cells(c, C, K, KP)
    m = tl.load(used + K * C + cell, there, 0.0)
    first, second = tl.zeros([KP, BM, BC], tl.float32), tl.zeros([KP, BM, BC], tl.float32)
    for j in range(p, TILES, P):
        at, ok = find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        g = tl.load(dy + at + within, ok, 0.0).to(tl.float32)[None]
        tau, _ = shares(v, ok, tables)
        owned = tau * g
        first += owned
        second += owned * (v - m)
    keep(part, p, 0, 2, tl.sum(first, 1, keep_dims=True), c, C, K, KP)
    keep(part, p, 1, 2, tl.sum(second, 1, keep_dims=True), c, C, K, KP)


@triton.jit(do_not_specialize=["T", "TILES", "P"])
def differentiate(
    x, dy, dx, pulled, part, used, weight, logits, mu, log_sigma, low, high, eps,
    C, M, sn, sm, sc, T, TILES, P,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write dx, and the sums of dl_k, dl_k z_k and dl_k z_k^2, (P, 3, K, C).

    Each program adds up what all left of `pulls`: P is small, and a launch would cost more.
    """
    p, c, within = place(C, sc, P, BM, BC, sm)
    tables = densities(logits, mu, log_sigma, low, high, c, C, FLOOR, K, KP)
    inverse = tables[2]
    m, gain, root = gains(used, weight, priors(logits, c, C, FLOOR, K, KP)[1], eps, c, C, K, KP)
    a = gain * root
    cell, there = cells(c, C, K, KP)
    mass = tl.load(used + cell, there, 0.0)
    # Through the batch's moments; the running ones have no gradient, and no part in that of x.
    share = tl.where(mass >= _MASS, -a / tl.maximum(mass, _MASS), 0.0)
    by_mean = share * total(pulled, 0, 2, P, c, C, BM, K, KP)
    by_var = 0.5 * share * root * root * total(pulled, 1, 2, P, c, C, BM, K, KP)
    constant = by_var * tl.load(used + 2 * K * C + cell, there, 0.0)
    zeroth = tl.zeros([KP, BM, BC], tl.float32)
    first, second = tl.zeros_like(zeroth), tl.zeros_like(zeroth)
    for j in range(p, TILES, P):
        at, ok = find(j, c, C, M, T, sn, sm, BM)
        v = tl.load(x + at + within, ok, 0.0).to(tl.float32)[None]
        g = tl.load(dy + at + within, ok, 0.0).to(tl.float32)[None]
        tau, z = shares(v, ok, tables)
        d = v - m
        slope = g * a + by_mean + by_var * d
        dtau = slope * d - constant
        dlogit = tau * (dtau - tl.sum(tau * dtau, 0, keep_dims=True))
        pulled_z = dlogit * z
        found = tl.sum(tau * (slope + by_var * d) - pulled_z * inverse, 0)
        tl.store(dx + at + within, found.to(dx.dtype.element_ty), ok)
        zeroth += dlogit
        first += pulled_z
        second += pulled_z * z
    keep(part, p, 0, 3, tl.sum(zeroth, 1, keep_dims=True), c, C, K, KP)
    keep(part, p, 1, 3, tl.sum(first, 1, keep_dims=True), c, C, K, KP)
    keep(part, p, 2, 3, tl.sum(second, 1, keep_dims=True), c, C, K, KP)


@triton.jit(do_not_specialize=["P"])
def finish(
    pulled, part, used, weight, logits, log_sigma, low, high, eps,
    dweight, dbias, dlogits, dmu, dlog_sigma, C, P, LEARNED: tl.constexpr,
    FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the parameters. LEARNED: m and v are mu and sigma^2."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    at, ok = cells(c, C, K, KP)
    share, log_prior = priors(logits, c, C, FLOOR, K, KP)
    _, gain, root = gains(used, weight, log_prior, eps, c, C, K, KP)
    raw = table(log_sigma, at, ok, 0.0)
    dbiases, dgain = total(pulled, 0, 2, P, c, C, BM, K, KP), root * total(pulled, 1, 2, P, c, C, BM, K, KP)
    zeroth, second = total(part, 0, 3, P, c, C, BM, K, KP), total(part, 2, 3, P, c, C, BM, K, KP)
    by_mu = total(part, 1, 3, P, c, C, BM, K, KP) * tl.exp(-tl.minimum(tl.maximum(raw, low), high))
    by_sigma = second - zeroth
    if LEARNED:
        by_mu -= gain * root * dbiases
        by_sigma -= gain * dgain
    by_sigma = tl.where((raw >= low) & (raw <= high), by_sigma, 0.0)
    inner = (zeroth - 0.5 * gain * dgain) * tl.exp(-log_prior)
    inner = tl.where(ok, inner, 0.0)
    dlogit = (1 - FLOOR) * share * (inner - tl.sum(share * inner, 0, keep_dims=True))
    dgain = tl.sum(tl.where(ok, dgain * tl.exp(-0.5 * log_prior), 0.0), 0)
    here = (c < C)[None]
    tl.store(dweight + c[None], dgain.to(dweight.dtype.element_ty), here)
    tl.store(dbias + c[None], tl.sum(dbiases, 0).to(dbias.dtype.element_ty), here)
    tl.store(dlogits + at, dlogit.to(dlogits.dtype.element_ty), ok)
    tl.store(dmu + at, by_mu.to(dmu.dtype.element_ty), ok)
    tl.store(dlog_sigma + at, by_sigma.to(dlog_sigma.dtype.element_ty), ok)
