"""What kernels do for samples without a label that weigh the contexts, each for itself.

A program takes one instance n and all contexts, KP rows, BC channels at a time. Its row in tables
(K + N, C) is K + n. Those of CN give variances, and an affine of each context, over sqrt(lambda);
those of CN-X, without eps, the logarithm of each standard deviation, and one weight or None.
"""

import triton
import triton.language as tl

from normswap.functional.triton.parts import add_dots, add_moments, find_parts, split_dots


@triton.jit
def load_rows(table, c, other, K, C, KP):
    """Return channels c of all contexts, (KP, BC)."""
    k = tl.arange(0, KP)
    ok = (k < K)[:, None] & (c < C)[None, :]
    return tl.load(table + k[:, None] * C + c[None, :], ok, other).to(tl.float32)


@triton.jit
def load_moments(mean, spread, eps, c, K, C, KP):
    """Return mean, reciprocal standard deviation and its logarithm of all contexts."""
    if eps is None:
        log_r = -load_rows(spread, c, 0.0, K, C, KP)
        r = tl.exp(log_r)
    else:
        r = tl.rsqrt(load_rows(spread, c, 1.0, K, C, KP) + eps)
        log_r = tl.log(r)
    return load_rows(mean, c, 0.0, K, C, KP), r, log_r


@triton.jit
def load_affine(weight, bias, priors, c, K, C, KP):
    """Return weight and bias of all contexts, over sqrt(lambda)."""
    k = tl.arange(0, KP)
    root = tl.rsqrt(tl.load(priors + k, k < K, 1.0).to(tl.float32))[:, None]
    return load_rows(weight, c, 0.0, K, C, KP) * root, load_rows(bias, c, 0.0, K, C, KP) * root


@triton.jit
def weigh(
    n, part_stats, mean, spread, priors, m_row, v_row, weights, eps, N, K, C, M, S, PART, KP, BN, BC
):
    """Write the probability of each context, and the moments; return the former, (KP, 1).

    With the instance's moments m, v, of which v may have no place to go:
    ``w_k = softmax_k(log lambda_k - 1/2 sum_c [log V_kc + (v_c + (m_c - mu_kc)^2) / V_kc])``.
    """
    # Parts are counted from the instance on: int32 divides at once.
    part_mean = part_stats + n * S * C
    part_var = part_mean + N.to(tl.int64) * S * C
    k = tl.arange(0, KP)
    per_value = tl.full([], 1.0, tl.float64) / M
    # Summed in float64, as there are many channels: the error of a logit is a weight's.
    logits = tl.log(tl.load(priors + k, k < K, 1.0).to(tl.float32)).to(tl.float64)
    for i in range(0, C, BC):
        c = i + tl.arange(0, BC)
        one, two = add_moments(part_mean, part_var, None, 0, S, c, C, M, S, PART, BN)
        m = one * per_value
        near, v = m.to(tl.float32), tl.maximum(two * per_value - m * m, 0.0).to(tl.float32)
        tl.store(m_row + c, near, c < C)
        if v_row is not None:
            tl.store(v_row + c, v, c < C)
        mu, r, log_r = load_moments(mean, spread, eps, c, K, C, KP)
        off = near[None, :] - mu
        cost = (v[None, :] + off * off) * r * r - 2 * log_r
        logits -= 0.5 * tl.sum(tl.where((c < C)[None, :], cost, 0.0), 1).to(tl.float64)
    logits = tl.where(k < K, logits, float("-inf"))
    share = tl.exp((logits - tl.max(logits, 0)).to(tl.float32))
    w = share / tl.sum(share, 0)
    tl.store(weights + n * K + k, w, k < K)
    # Other threads have written what this one is to read.
    tl.debug_barrier()
    return w[:, None]


@triton.jit
def posterior_gradients(
    n, dots, mean, spread, weight, bias, priors, centre, weights, eps, N, R, K, C, M, S, KP, BN, BC
):
    """Write what else than ``dy * scale`` dx has, ``spread (x - m) + constant``; return slopes.

    With D1 = sum dy, D2 = sum dy (x - m) of the instance about the centre m of its row,
    A_k = weight_k / sqrt(V_k), and the logits l:
    ``dw_k = sum_c A_k (D2 + (m - mu_k) D1) + bias_k D1``, ``dl_k = w_k (dw_k - sum_j w_j dw_j)``,
    spread = -sum_k dl_k / (V_k M), constant = -sum_k dl_k (m - mu_k) / (V_k M). The slopes are dl.
    """
    first, second, by_x, constant = split_dots(dots, N, R, C, S)
    first += n * S * C
    second += n * S * C
    k = tl.arange(0, KP)
    row = (K + n) * C
    dw = tl.zeros([KP], tl.float64)
    for i in range(0, C, BC):
        c = i + tl.arange(0, BC)
        one, two = add_dots(first, second, None, 0, S, c, C, S, BN)
        mu, r, _ = load_moments(mean, spread, eps, c, K, C, KP)
        off = tl.load(centre + row + c, c < C, 0.0)[None, :] - mu
        by_scale = r * (two[None, :] + off * one[None, :])
        if eps is not None:
            gain, b = load_affine(weight, bias, priors, c, K, C, KP)
            by_scale = gain * by_scale + b * one[None, :]
        elif weight is not None:
            by_scale *= tl.load(weight + c, c < C, 0.0).to(tl.float32)[None, :]
        dw += tl.sum(by_scale, 1).to(tl.float64)
    # As rounded, weights sum to 1 but for 1e-7: more than those of all contexts but one can have.
    w = tl.load(weights + n * K + k, k < K, 0.0).to(tl.float64)
    slopes = (w * (dw * tl.sum(w, 0) - tl.sum(w * dw, 0))).to(tl.float32)
    minus = -slopes[:, None] / M
    for i in range(0, C, BC):
        c = i + tl.arange(0, BC)
        mu, r, _ = load_moments(mean, spread, eps, c, K, C, KP)
        off = tl.load(centre + row + c, c < C, 0.0)[None, :] - mu
        tl.store(by_x + row + c, tl.sum(minus * r * r, 0), c < C)
        tl.store(constant + row + c, tl.sum(minus * r * r * off, 0), c < C)
    return slopes


@triton.jit
def add_weighted_dots(first, second, order, weights, centre, mu, lo, hi, k, c, K, C, S, BN):
    """Return what `add_dots` does, of parts with the weights of context k, about its mean mu."""
    one, two = tl.zeros(c.shape, tl.float32), tl.zeros(c.shape, tl.float32)
    for i in range(lo, hi, BN):
        at, _, ok = find_parts(order, i, hi, c, C, S, BN)
        j = i + tl.arange(0, BN)
        n = tl.load(order + j // S, j < hi, 0).to(tl.int64)
        w = tl.load(weights + n * K + k, j < hi, 0.0)[:, None]
        off = tl.load(centre + (K + n)[:, None] * C + c[None, :], ok, 0.0) - mu[None, :]
        by_one = w * tl.load(first + at, ok, 0.0)
        one += tl.sum(by_one, 0)
        two += tl.sum(w * tl.load(second + at, ok, 0.0) + off * by_one, 0)
    return one, two
