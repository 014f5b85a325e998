"""What the kernels of a mixture share: where tiles and tables lie, and who owns a value.

A program takes BC channels and every P-th tile of BM positions, whatever instance it is of: tables
(K, C) are the same for all. Tiles are (KP, BM, BC), components first, of which a thread has all:
sums over components need no exchange. KP is the power of two not below K.

With e = x - mu_0 and z_k = (x - mu_k) / sigma_k, logits are differences to the first component's:
``z_k^2 - z_0^2 = (z_k - z_0) (z_k + z_0)`` with
``z_k - z_0 = e (1 / sigma_k - 1 / sigma_0) + (mu_0 - mu_k) / sigma_k``, which is exactly zero for
components that are alike, whatever operations the compiler fuses. In powers of two.
"""

import triton
import triton.language as tl

# As `mixture.MASS`: a component that owns less of a batch has no moments there.
MASS = tl.constexpr(1e-3)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(C, sm, sc, BM, BC):
    """Return this program's number of the P of its channels, these, and offsets in a tile."""
    width = tl.cdiv(C, BC)
    first = tl.program_id(0) % width * BC
    column = tl.arange(0, BC)
    within = tl.arange(0, BM)[:, None] * sm + column[None, :] * sc
    return tl.program_id(0) // width, first + column, first.to(tl.int64) * sc + within


@triton.jit
def find(j, c, C, M, T, sn, sm, BM):
    """Return where tile j of the T an instance has begins, and which of it are values."""
    n, i = j // T, j % T * BM
    ok = (i + tl.arange(0, BM) < M)[:, None] & (c < C)[None, :]
    return n.to(tl.int64) * sn + i.to(tl.int64) * sm, ok


@triton.jit
def table(pointer, at, ok, other):
    """Return a table in float32."""
    return tl.load(pointer + at, ok, other).to(tl.float32)


@triton.jit
def cells(c, C, K, KP):
    """Return where the channels' part of a table (K, C) lies, (KP, 1, BC), and a mask."""
    k, c = tl.arange(0, KP)[:, None, None], c[None, None, :]
    return k * C + c, (k < K) & (c < C)


@triton.jit
def priors(logits, c, C, FLOOR, K, KP):
    """Return the softmax of logits and log lambda; see `mixture_start.bounded_log_prior`."""
    at, ok = cells(c, C, K, KP)
    there = tl.arange(0, KP)[:, None, None] < K
    raw = tl.where(there, table(logits, at, ok, 0.0), float("-inf"))
    odds = tl.exp(raw - tl.max(raw, 0, keep_dims=True))
    share = odds / tl.sum(odds, 0, keep_dims=True)
    return share, tl.where(there, tl.log(FLOOR / K + (1 - FLOOR) * share), 0.0)


@triton.jit
def spread(log_sigma, at, ok, least, most):
    """Return log sigma within its bounds."""
    return tl.minimum(tl.maximum(table(log_sigma, at, ok, 0.0), least), most)


@triton.jit
def densities(logits, mu, log_sigma, least, most, c, C, FLOOR, K, KP):
    """Return what `shares` reads: mu_0, 1 / sigma_0, 1 / sigma, logits in parts, log lambda."""
    at, ok = cells(c, C, K, KP)
    _, log_prior = priors(logits, c, C, FLOOR, K, KP)
    ls, first = spread(log_sigma, at, ok, least, most), c[None, None, :]
    inverse, one = tl.exp(-ls), tl.exp(-spread(log_sigma, first, first < C, least, most))
    centre = table(mu, first, first < C, 0.0)
    off = (centre - table(mu, at, ok, 0.0)) * inverse
    constant = tl.where(tl.arange(0, KP)[:, None, None] < K, log_prior - ls, float("-inf"))
    half: tl.constexpr = -0.5 * _LOG2E
    slope, rise, constant = (inverse - one) * half, off * half, constant * _LOG2E
    return centre, one, inverse, off, slope, rise, constant, log_prior


@triton.jit
def shares(v, ok, tables):
    """Return tau, zero where there is no value, and z, both (KP, BM, BC), of values (1, BM, BC)."""
    centre, one, inverse, off, slope, rise, constant, _ = tables
    e = v - centre
    z = e * inverse + off
    logit = (e * slope + rise) * (z + e * one) + constant
    odds = tl.exp2(logit - tl.max(logit, 0, keep_dims=True))
    return odds * tl.where(ok[None], 1.0 / tl.sum(odds, 0, keep_dims=True), 0.0), z


@triton.jit
def total(part, row, rows, P, c, C, BM, K, KP):
    """Return the sum of a row of the programs' parts, (KP, 1, BC)."""
    at, ok = cells(c, C, K, KP)
    found = tl.zeros([KP, BM, c.shape[0]], tl.float32)
    for i in range(0, P, BM):
        p = (i + tl.arange(0, BM))[None, :, None]
        # Not as `load_f64` reads: these would spread the components of a tile over threads.
        cell = tl.max_contiguous((p * rows + row) * K * C + at, [1, 1, 1])
        found += tl.load(part + cell, ok & (p < P), 0.0)
    return tl.sum(found, 1, keep_dims=True)


@triton.jit
def keep(part, p, rows, values, c, C, K, KP):
    """Write the rows of this program's part: sums over the tile of so many values."""
    at, ok = cells(c, C, K, KP)
    for row in tl.static_range(rows):
        found = tl.sum(values[row], 1, keep_dims=True)
        tl.store(part + (p * rows + row) * K * C + at, found, ok)


@triton.jit
def gains(used, weight, log_prior, eps, c, C, K, KP):
    """Return m, gain and 1 / sqrt(v + eps) of the components."""
    at, ok = cells(c, C, K, KP)
    gain = table(weight, c, c < C, 0.0)[None, None] * tl.exp(-0.5 * log_prior)
    v = tl.load(used + 2 * K * C + at, ok, 1.0)
    return tl.load(used + K * C + at, ok, 0.0), gain, 1.0 / tl.sqrt(v + eps)


@triton.jit
def settle_moments(sums, used, given, least, most, momentum, factor, c, C, UPDATE, K, KP):
    """Write mass, mean and variance that components are normalised with, (3, K, C).

    From tau, tau x and tau x^2, in float64, which are summed along a tile here. A component that
    owns less than a thousandth of a value takes the running mean and variance, or its own where
    there are none. With UPDATE the others move theirs: by momentum, or where that is None, as
    cumulative averages. Mean and variance, (KP, 1, BC), are returned.
    """
    mass = tl.sum(sums[0], 1, keep_dims=True)
    first, second = tl.sum(sums[1], 1, keep_dims=True), tl.sum(sums[2], 1, keep_dims=True)
    mu, log_sigma, mean, var, batches = given
    at, ok = cells(c, C, K, KP)
    usable, share = mass >= MASS, tl.maximum(mass, MASS)
    batch = first / share
    squares = tl.maximum(second / share - batch * batch, 0.0)
    if mean is None:
        m, v = table(mu, at, ok, 0.0), tl.exp(2 * spread(log_sigma, at, ok, least, most))
    else:
        m, v = table(mean, at, ok, 0.0), table(var, at, ok, 1.0)
    m_used = tl.where(usable, batch.to(tl.float32), m)
    v_used = tl.where(usable, squares.to(tl.float32), v)
    tl.store(used + at, mass.to(tl.float32), ok)
    tl.store(used + K * C + at, m_used, ok)
    tl.store(used + 2 * K * C + at, v_used, ok)
    if UPDATE:
        if momentum is None:
            rate = 1.0 / (tl.load(batches) + 1).to(tl.float32)
        else:
            rate = momentum
        mine = ok & usable
        tl.store(mean + at, m + rate * (m_used - m), mine)
        tl.store(var + at, v + rate * (v_used * factor - v), mine)
    return m_used, v_used


@triton.jit
def write_gradients(sums, tables, targets, least, most, eps, c, C, LEARNED, FLOOR, K, KP):
    """Write the gradients of weight, bias, logits, mu and log sigma.

    From ``sum dy tau, sum dy tau (x - m), sum dl, sum dl z, sum dl z^2``; see `mixture_fused`.
    LEARNED: m and v are mu and sigma^2.
    """
    sum_dy, along, zeroth, first, second = sums
    used, weight, logits, log_sigma = tables
    dweight, dbias, dlogits, dmu, dlog_sigma = targets
    at, ok = cells(c, C, K, KP)
    share, log_prior = priors(logits, c, C, FLOOR, K, KP)
    _, gain, root = gains(used, weight, log_prior, eps, c, C, K, KP)
    raw, dgain = table(log_sigma, at, ok, 0.0), root * along
    by_mu = first * tl.exp(-tl.minimum(tl.maximum(raw, least), most))
    by_sigma = second - zeroth
    if LEARNED:
        by_mu -= gain * root * sum_dy
        by_sigma -= gain * dgain
    by_sigma = tl.where((raw >= least) & (raw <= most), by_sigma, 0.0)
    inner = tl.where(ok, (zeroth - 0.5 * gain * dgain) * tl.exp(-log_prior), 0.0)
    dlogit = (1 - FLOOR) * share * (inner - tl.sum(share * inner, 0, keep_dims=True))
    dgain = tl.sum(tl.where(ok, dgain * tl.exp(-0.5 * log_prior), 0.0), 0)
    here = (c < C)[None]
    tl.store(dweight + c[None], dgain, here)
    tl.store(dbias + c[None], tl.sum(sum_dy, 0), here)
    tl.store(dlogits + at, dlogit, ok)
    tl.store(dmu + at, by_mu, ok)
    tl.store(dlog_sigma + at, by_sigma, ok)
