"""CN-X's kernels over tables (K + 1, C); rows and pooled contexts are as in `cn_kernels`."""

import triton
import triton.language as tl

from normswap.functional.triton.parts import (
    add_dots,
    add_priors,
    find_parts,
    find_parts_of,
    pool,
    split,
    take_row,
)


@triton.jit(do_not_specialize=["low", "high", "N", "K"])
def tables(
    mu, log_sigma, weight, bias, priors, rows, found, low, high,
    N, K, C, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the map of each row, ``y = (x - centre) * scale + shift``, and 1 / sigma."""
    k, c, at, ok = take_row(tl.program_id(0), C, BC)
    centre, scale, shift, inverse = split(found, K + 1, C)
    near = tl.zeros([BC], tl.float32)
    left = tl.zeros([BC], tl.float32)
    inv = tl.zeros([BC], tl.float32)
    if k < K:
        near = tl.load(mu + at, ok, 0.0).to(tl.float32)
        inv = tl.exp(-tl.load(log_sigma + at, ok, 0.0).to(tl.float32))
    else:
        needed = True
        if rows is not None:
            offsets = rows + 2 * N + K
            needed = tl.load(offsets + 1) > tl.load(offsets)
        if needed:
            m, v, _, _ = pool(mu, log_sigma, None, None, priors, low, high, c, C, True, BN)
            near = m.to(tl.float32)
            left = (m - near).to(tl.float32)
            inv = tl.rsqrt(v.to(tl.float32))
    gain, bias_k = inv, tl.zeros([BC], tl.float32)
    if weight is not None:
        gain *= tl.load(weight + c, ok, 0.0).to(tl.float32)
        bias_k = tl.load(bias + c, ok, 0.0).to(tl.float32)
    tl.store(centre + at, near, ok)
    tl.store(scale + at, gain, ok)
    # The shift makes up for what rounding leaves of the pooled mean.
    tl.store(shift + at, bias_k - left * gain, ok)
    tl.store(inverse + at, inv, ok)


@triton.jit(do_not_specialize=["low", "high", "N", "K", "S"])
def pull(
    dots, rows, tables, mu, log_sigma, priors, dmu, dlog_sigma, dweight, dbias, low, high,
    N, K, C, S, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of mu and log sigma in rows of contexts, of weight and bias in row K.

    With D1 = sum dy and D2 = sum dy (x - mu_k) over the instances of a context, and A = weight /
    sigma_k: dmu = -A D1, dlog_sigma = -A D2; dweight = sum_k D2 / sigma_k, dbias = sum_k D1.
    """
    k, c, at, ok = take_row(tl.program_id(0), C, BC)
    lying = split(tables, K + 1, C)
    centre, scale, inverse = lying[0], lying[1], lying[3]
    first, second = dots, dots + N.to(tl.int64) * S * C
    order, offsets = rows + N, rows + 2 * N
    if k < K:
        lo, hi = find_parts_of(offsets, k, S)
        one, two = add_dots(first, second, order, lo, hi, c, C, S, BN)
        a = tl.load(scale + at, ok, 0.0)
        dm, dl = -a * one, -a * two
        lo, hi = find_parts_of(offsets, K, S)
        if (lo < hi) & (low <= k) & (k < high):
            # Samples without a label have a share of every context that is pooled.
            share = tl.load(priors + k).to(tl.float32) / add_priors(priors, low, high, BN)
            one, two = add_dots(first, second, order, lo, hi, c, C, S, BN)
            pool = K.to(tl.int64) * C + c
            a, r = tl.load(scale + pool, ok, 0.0), tl.load(inverse + pool, ok, 0.0)
            by_var = -0.5 * a * r * r * two
            off = tl.load(mu + at, ok, 0.0).to(tl.float32) - tl.load(centre + pool, ok, 0.0)
            var = tl.exp(2 * tl.load(log_sigma + at, ok, 0.0).to(tl.float32))
            dm += share * (2 * off * by_var - a * one)
            dl += share * 2 * var * by_var
        tl.store(dmu + at, dm.to(dmu.dtype.element_ty), ok)
        tl.store(dlog_sigma + at, dl.to(dlog_sigma.dtype.element_ty), ok)
    elif dweight is not None:
        by_weight = tl.zeros([BC], tl.float32)
        by_bias = tl.zeros([BC], tl.float32)
        for i in range(0, N * S, BN):
            parts, _, there = find_parts(None, i, N * S, c, C, S, BN)
            n = (i + tl.arange(0, BN)) // S
            row = tl.load(rows + n, n < N, 0)[:, None] * C + c[None, :]
            one = tl.load(first + parts, there, 0.0)
            by_bias += tl.sum(one, 0)
            two = tl.load(second + parts, there, 0.0)
            by_weight += tl.sum(two * tl.load(inverse + row, there, 0.0), 0)
        tl.store(dweight + c, by_weight.to(dweight.dtype.element_ty), ok)
        tl.store(dbias + c, by_bias.to(dbias.dtype.element_ty), ok)
