"""What becomes of a mixture's sums over a batch: the moments it normalises with, and gradients."""

import triton
import triton.language as tl

from normswap.functional.triton.mixture_tile import MASS, cells, gains, priors, spread, table


@triton.jit
def settle_moments(
    sums, used, given, least, most, momentum, factor, c, C,
    UPDATE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Write mass, mean and variance that components are normalised with, (3, K, C).

    From ``sum tau, sum tau x, sum tau x^2`` in float64. A component that owns less than a
    thousandth of a value takes the running mean and variance, or its own where there are none.
    With UPDATE the others move theirs: by momentum, or where that is None, as cumulative averages.

    Returns:
        Mean and variance, (KP, 1, BC).
    """
    mass, first, second = sums
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
        tl.store(mean + at, (m + rate * (m_used - m)).to(mean.dtype.element_ty), mine)
        tl.store(var + at, (v + rate * (v_used * factor - v)).to(var.dtype.element_ty), mine)
    return m_used, v_used


@triton.jit
def write_gradients(
    sums, tables, targets, least, most, eps, c, C,
    LEARNED: tl.constexpr, FLOOR: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of weight, bias, logits, mu and log sigma.

    From ``sum dy tau, sum dy tau (x - m), sum dl, sum dl z, sum dl z^2``; see `mixture_fused`.
    LEARNED: m and v are mu and sigma^2.
    """
    pulled, along, zeroth, first, second = sums
    used, weight, logits, log_sigma = tables
    dweight, dbias, dlogits, dmu, dlog_sigma = targets
    at, ok = cells(c, C, K, KP)
    share, log_prior = priors(logits, c, C, FLOOR, K, KP)
    _, gain, root = gains(used, weight, log_prior, eps, c, C, K, KP)
    raw, dgain = table(log_sigma, at, ok, 0.0), root * along
    by_mu = first * tl.exp(-tl.minimum(tl.maximum(raw, least), most))
    by_sigma = second - zeroth
    if LEARNED:
        by_mu -= gain * root * pulled
        by_sigma -= gain * dgain
    by_sigma = tl.where((raw >= least) & (raw <= most), by_sigma, 0.0)
    inner = tl.where(ok, (zeroth - 0.5 * gain * dgain) * tl.exp(-log_prior), 0.0)
    dlogit = (1 - FLOOR) * share * (inner - tl.sum(share * inner, 0, keep_dims=True))
    dgain = tl.sum(tl.where(ok, dgain * tl.exp(-0.5 * log_prior), 0.0), 0)
    here = (c < C)[None]
    tl.store(dweight + c[None], dgain.to(dweight.dtype.element_ty), here)
    tl.store(dbias + c[None], tl.sum(pulled, 0).to(dbias.dtype.element_ty), here)
    tl.store(dlogits + at, dlogit.to(dlogits.dtype.element_ty), ok)
    tl.store(dmu + at, by_mu.to(dmu.dtype.element_ty), ok)
    tl.store(dlog_sigma + at, by_sigma.to(dlog_sigma.dtype.element_ty), ok)
