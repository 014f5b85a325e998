"""CN-X's kernels over tables (K + 1, C), whose rows and pooled contexts are as in `cn_kernels`.

Where samples without a label weigh the contexts, each for itself, tables are (K + N, C), with their
moments, (2, N, C), and weights, (N, K), behind them, and N programs follow the others.
"""

import triton
import triton.language as tl

from normswap.functional.triton import parts
from normswap.functional.triton.posterior_kernels import (
    add_weighted_dots,
    load_moments,
    posterior_gradients,
    weigh,
)


@triton.jit(do_not_specialize=["low", "high", "N", "R", "K", "S"])
def tables(
    mu, log_sigma, weight, bias, priors, part_stats, rows, found, low, high,
    N, R, K, C, M, S, PART, BN: tl.constexpr, BC: tl.constexpr,
    KP: tl.constexpr, WN: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Write the map of each row, ``y = (x - centre) * scale + shift``, and 1 / sigma."""
    program, own = tl.program_id(0), K * tl.cdiv(C, BC)
    if KP > 0:
        if program >= own:
            n, needed = (program - own).to(tl.int64), True
            if rows is not None:
                needed = tl.load(rows + n) >= K
            if needed:
                mean, var, weights = split_rest(found, N, R, C)
                w = weigh(
                    n, part_stats, mu, log_sigma, priors, mean + n * C, var + n * C, weights, None,
                    N, K, C, M, S, PART, KP, WN, WC,
                )  # fmt: skip
                row = (K + n) * C
                mix(w, mean + n * C, found, row, mu, log_sigma, weight, bias, R, K, C, KP, WC)
            return
    k, c, at, ok = parts.take_row(program, C, BC)
    near = tl.zeros([BC], tl.float32)
    left, inv = tl.zeros_like(near), tl.zeros_like(near)
    if KP > 0 or k < K:
        near = tl.load(mu + at, ok, 0.0).to(tl.float32)
        inv = tl.exp(-tl.load(log_sigma + at, ok, 0.0).to(tl.float32))
    else:
        needed = True
        if rows is not None:
            offsets = rows + 2 * N + K
            needed = tl.load(offsets + 1) > tl.load(offsets)
        if needed:
            m, v, _, _ = parts.pool(mu, log_sigma, None, None, priors, low, high, c, C, True, BN)
            near = m.to(tl.float32)
            left = (m - near).to(tl.float32)
            inv = tl.rsqrt(v.to(tl.float32))
    write_row(found, at, near, left, inv, weight, bias, c, R, C)


@triton.jit
def write_row(tables, at, near, left, inv, weight, bias, c, R, C):
    """Write ``y = weight * (x - near - left) * inv + bias``, as the map about near, and inv."""
    centre, scale, shift, inverse = parts.split(tables, R, C)
    ok, gain, b = c < C, inv, tl.zeros_like(inv)
    if weight is not None:
        gain *= tl.load(weight + c, ok, 0.0).to(tl.float32)
        b = tl.load(bias + c, ok, 0.0).to(tl.float32)
    tl.store(centre + at, near, ok)
    tl.store(scale + at, gain, ok)
    # The shift makes up for what rounding leaves of the mean.
    tl.store(shift + at, b - left * gain, ok)
    tl.store(inverse + at, inv, ok)


@triton.jit
def split_rest(tables, N, R, C):
    """Return what lies behind the tables: mean and variance of instances, and their weights."""
    mean, size = tables + 4 * R.to(tl.int64) * C, N.to(tl.int64) * C
    return mean, mean + size, mean + 2 * size


@triton.jit
def mix(w, mean, tables, row, mu, log_sigma, weight, bias, R, K, C, KP, BC):
    """Write the map that weights w mix of contexts, in a row, given the mean m of the instance.

    Contexts share weight and bias, so it is of one mean and spread s again:
    ``1 / s = sum_k w_k / sigma_k``, and ``m - s sum_k w_k (m - mu_k) / sigma_k``.
    """
    for i in range(0, C, BC):
        c = i + tl.arange(0, BC)
        m = tl.load(mean + c, c < C, 0.0)
        means, r, _ = load_moments(mu, log_sigma, None, c, K, C, KP)
        inv = tl.sum(w * r, 0)
        off = tl.sum(w * r * (m[None, :] - means), 0) / inv
        near = m - off
        write_row(tables, row + c, near, (m - near) - off, inv, weight, bias, c, R, C)


@triton.jit(do_not_specialize=["N", "R", "K", "S"])
def weight_gradients(
    dots, rows, tables, mu, log_sigma, weight, bias, priors,
    N, R, K, C, M, S, KP: tl.constexpr, WN: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Write, for instances that weigh the contexts, what `posterior_gradients` says.

    The slopes, (N, K), lie behind what else backward adds up.
    """
    n, k = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    if tl.load(rows + n) >= K:
        weights = split_rest(tables, N, R, C)[2]
        slopes = posterior_gradients(
            n, dots, mu, log_sigma, weight, None, None, tables, weights, None,
            N, R, K, C, M, S, KP, WN, WC,
        )  # fmt: skip
        behind = parts.split_dots(dots, N, R, C, S)[3] + R.to(tl.int64) * C
        tl.store(behind + n * K + k, slopes, k < K)


@triton.jit(do_not_specialize=["low", "high", "N", "R", "K", "S"])
def gradients(
    dots, rows, tables, mu, log_sigma, weight, bias, priors, dmu, dlog_sigma, dweight, dbias,
    low, high, N, R, K, C, M, S, MOVES: tl.constexpr, WEIGHED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of mu and log sigma in rows of contexts, of weight and bias in row K.

    With D1 = sum dy and D2 = sum dy (x - mu_k) over the instances of a context, and A = weight /
    sigma_k: dmu = -A D1, dlog_sigma = -A D2; dweight = sum_k D2 / sigma_k, dbias = sum_k D1.
    Samples without a label that have WEIGHED the contexts have the same share, with D1 and D2
    weighed, and, through the slopes dl of their logits and with their moments m, v,
    ``dmu = sum dl (m - mu_k) / sigma_k^2``, ``dlog_sigma = sum dl ((v + (m - mu_k)^2) / sigma_k^2
    - 1)``.
    """
    k, c, at, ok = parts.take_row(tl.program_id(0), C, BC)
    lying = parts.split(tables, R, C)
    centre, scale, inverse = lying[0], lying[1], lying[3]
    first, second, spread, constant = parts.split_dots(dots, N, R, C, S)
    order, offsets = rows + N, rows + 2 * N
    if k < K:
        lo, hi = parts.find_parts_of(offsets, k, S)
        one, two = parts.add_dots(first, second, order, lo, hi, c, C, S, BN)
        a = tl.load(scale + at, ok, 0.0)
        dm, dl = -a * one, -a * two
        lo, hi = parts.find_parts_of(offsets, K, S)
        if WEIGHED:
            near, r = tl.load(centre + at, ok, 0.0), tl.load(inverse + at, ok, 0.0)
            mean, var, weights = split_rest(tables, N, R, C)
            one, two = add_weighted_dots(
                first, second, order, weights, centre, near, lo, hi, k, c, K, C, S, BN
            )
            dm -= a * one
            dl -= a * two
            slopes = constant + R.to(tl.int64) * C
            lo, hi = parts.find_parts_of(offsets, K, 1)
            for i in range(lo, hi, BN):
                lie, _, there = parts.find_parts(order, i, hi, c, C, 1, BN)
                j = i + tl.arange(0, BN)
                n = tl.load(order + j, j < hi, 0)
                slope = tl.load(slopes + n * K + k, j < hi, 0.0)[:, None]
                z = (tl.load(mean + lie, there, 0.0) - near[None, :]) * r[None, :]
                dm += tl.sum(slope * z, 0) * r
                z2 = z * z + tl.load(var + lie, there, 0.0) * (r * r)[None, :]
                dl += tl.sum(slope * (z2 - 1), 0)
            if MOVES:
                # Of dx, instances of contexts have nothing but dy * scale.
                tl.store(spread + at, tl.zeros_like(a), ok)
                tl.store(constant + at, tl.zeros_like(a), ok)
        elif (lo < hi) & (low <= k) & (k < high):
            # Samples without a label have a share of every context that is pooled.
            share = tl.load(priors + k).to(tl.float32) / parts.add_priors(priors, low, high, BN)
            one, two = parts.add_dots(first, second, order, lo, hi, c, C, S, BN)
            pool = K.to(tl.int64) * C + c
            a, r = tl.load(scale + pool, ok, 0.0), tl.load(inverse + pool, ok, 0.0)
            by_var = -0.5 * a * r * r * two
            off = tl.load(mu + at, ok, 0.0).to(tl.float32) - tl.load(centre + pool, ok, 0.0)
            var = tl.exp(2 * tl.load(log_sigma + at, ok, 0.0).to(tl.float32))
            dm += share * (2 * off * by_var - a * one)
            dl += share * 2 * var * by_var
        tl.store(dmu + at, dm, ok)
        tl.store(dlog_sigma + at, dl, ok)
    elif dweight is not None:
        by_weight, by_bias = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for i in range(0, N * S, BN):
            lie, _, there = parts.find_parts(None, i, N * S, c, C, S, BN)
            n = (i + tl.arange(0, BN)) // S
            row = tl.load(rows + n, n < N, 0)[:, None] * C + c[None, :]
            one = tl.load(first + lie, there, 0.0)
            by_bias += tl.sum(one, 0)
            two = tl.load(second + lie, there, 0.0)
            by_weight += tl.sum(two * tl.load(inverse + row, there, 0.0), 0)
        tl.store(dweight + c, by_weight, ok)
        tl.store(dbias + c, by_bias, ok)
