"""CN's kernels over tables (K + 1, C): of K contexts, and of samples without a label.

Where each of the latter weighs the contexts for itself, there are (K + N, C), and programs of one
instance each, of `posterior_kernels`, after the others.

A program takes one row and BC channels. It walks the instances of its context, which are sorted,
BN at a time: `rows`, if SORTED, has the row of each instance, (N,), then the instances by context,
then where in those a context starts, (K + 2,). Contexts `low` to `high` are pooled for the samples
without a label: all, one, or, if that is an error, none, which makes their row NaN.
"""

import triton
import triton.language as tl

from normswap.functional.triton import parts
from normswap.functional.triton.posterior_kernels import (
    add_weighted_dots,
    load_affine,
    load_moments,
    posterior_gradients,
    weigh,
)
from normswap.functional.triton.tile import apply


@triton.jit
def split_rest(rest, K, C):
    """Return what lies behind centre, scale and shift.

    Reciprocal standard deviations and variances, (K + 1, C); the number of values that are in the
    batch, 0 where the moments are not the batch's, and how far the running moments are to move,
    (K + 1,) in whole lines of 16; and, where samples weigh the contexts, the moments, (K, C), that
    they compare with, and their weights, (N, K).
    """
    size, line = K.to(tl.int64) * C, (K + 16) // 16 * 16
    var = rest + size + C
    values = var + size + C
    known = values + 2 * line
    return rest, var, values, values + line, known, known + size, known + 2 * size


@triton.jit(do_not_specialize=["low", "high", "N", "R", "K", "S"])
def tables(
    running_mean, running_var, batches, weight, bias, priors, part_stats, rows, found,
    low, high, eps, momentum, N, R, K, C, M, S, PART, BATCH: tl.constexpr, SORTED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, WN: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Write the map of each row, ``y = (x - centre) * scale + shift``, and what it is made of.

    With moments of the BATCH where a context has two values or more, else with the
    running ones. Of KP contexts, 0 for none, samples without a label weigh all; the running
    moments that they compare with are kept, as these are to move: by momentum, or, where that is
    None, to the average of all batches.
    """
    program, own = tl.program_id(0), K * tl.cdiv(C, BC)
    k, c, at, ok = parts.take_row(program, C, BC)
    centre, scale, shift, rest = parts.split(found, R, C)
    inverse, var, values, rates, known_mean, known_var, weights = split_rest(rest, K, C)
    if KP > 0:
        if program >= own:
            n, needed = (program - own).to(tl.int64), True
            if rows is not None:
                needed = tl.load(rows + n) >= K
            if needed:
                row = found + (K + n) * C
                w = weigh(
                    n, part_stats, running_mean, running_var, priors, row, None, weights, eps,
                    N, K, C, M, S, PART, KP, WN, WC,
                )  # fmt: skip
                mix(w, row, running_mean, running_var, weight, bias, priors, eps, R, K, C, KP, WC)
            return
    mu, v = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
    gain, bias_k, count = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32), 0.0
    if KP > 0 or k < K:
        root = tl.rsqrt(tl.load(priors + k).to(tl.float32))
        gain = tl.load(weight + at, ok, 0.0).to(tl.float32) * root
        bias_k = tl.load(bias + at, ok, 0.0).to(tl.float32) * root
        mu, v = parts.load_f64(running_mean, at, ok), parts.load_f64(running_var, at, ok)
        if KP > 0:
            tl.store(known_mean + at, mu, ok)
            tl.store(known_var + at, v, ok)
        if BATCH:
            offsets = rows + 2 * N
            lo, hi = tl.load(offsets + k), tl.load(offsets + k + 1)
            number = (hi - lo) * M
            if number > 1:
                count = number.to(tl.float32)
                part_var = part_stats + N.to(tl.int64) * S * C
                mu, two = parts.add_moments(
                    part_stats, part_var, rows + N, lo * S, hi * S, c, C, M, S, PART, BN
                )
                mu /= number
                v = tl.maximum(two / number - mu * mu, 0.0)
    else:
        needed = True
        if SORTED:
            offsets = rows + 2 * N + K
            needed = tl.load(offsets + 1) > tl.load(offsets)
        if needed:
            mu, v, gain, bias_k = parts.pool(
                running_mean, running_var, weight, bias, priors, low, high, c, C, False, BN
            )
    near, spread = mu.to(tl.float32), v.to(tl.float32)
    inv = tl.rsqrt(spread + eps)
    tl.store(centre + at, near, ok)
    tl.store(scale + at, gain * inv, ok)
    # The shift makes up for what rounding leaves of a mean that is large against the spread.
    tl.store(shift + at, bias_k - (mu - near).to(tl.float32) * (gain * inv), ok)
    tl.store(inverse + at, inv, ok)
    tl.store(var + at, spread, ok)
    if program % tl.cdiv(C, BC) == 0:
        tl.store(values + k, count)
        if BATCH:
            rate = 0.0
            if count > 1.5:
                if momentum is None:
                    rate = 1 / (tl.load(batches + k) + 1).to(tl.float32)
                else:
                    rate = momentum
            tl.store(rates + k, rate)


@triton.jit
def mix(w, row, mean, var, weight, bias, priors, eps, R, K, C, KP, BC):
    """Write the map that weights w mix, about the mean m of an instance, which is in its row.

    ``scale = sum_k w_k A_k``, A_k = weight_k / sqrt(V_k), and
    ``shift = sum_k w_k (bias_k + (m - mu_k) A_k)``.
    """
    size = R.to(tl.int64) * C
    for i in range(0, C, BC):
        c = i + tl.arange(0, BC)
        near = tl.load(row + c, c < C, 0.0)[None, :]
        mu, r, _ = load_moments(mean, var, eps, c, K, C, KP)
        gain, b = load_affine(weight, bias, priors, c, K, C, KP)
        tl.store(row + size + c, tl.sum(w * (gain * r), 0), c < C)
        tl.store(row + 2 * size + c, tl.sum(w * (b + (near - mu) * (gain * r)), 0), c < C)


@triton.jit(do_not_specialize=["R", "K", "si", "S"])
def apply_and_move(
    x, y, tables, rows, running_mean, running_var, batches, R, K,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Do what `apply` does, and move the running statistics of contexts with moments.

    A launch after `tables` has read them for samples without a label.
    """
    apply(x, y, tables, rows, None, None, 1, R, K, C, C, M, sn, sm, sc, S, PART, BM, BC)
    rest, width = split_rest(parts.split(tables, R, C)[3], K, C), tl.cdiv(C, BC)
    var, values, rates = rest[1], rest[2], rest[3]
    for block in range(tl.program_id(0), K * width, tl.num_programs(0)):
        k, _, at, ok = parts.take_row(block, C, BC)
        count, rate = tl.load(values + k), tl.load(rates + k)
        if count > 1.5:
            new = tl.load(var + at, ok, 0.0) * (count / (count - 1))
            move(running_mean, tl.load(tables + at, ok, 0.0), rate, at, ok)
            move(running_var, new, rate, at, ok)
            if block % width == 0:
                tl.store(batches + k, tl.load(batches + k) + 1)


@triton.jit
def move(running, new, rate, at, ok):
    """Move a row of running statistics towards a new one."""
    old = tl.load(running + at, ok, 0.0).to(tl.float32)
    tl.store(running + at, old + rate * (new - old), ok)


@triton.jit(do_not_specialize=["low", "high", "N", "R", "K", "S"])
def gradients(
    dots, rows, tables, weight, bias, priors, dweight, dbias, low, high, eps,
    N, R, K, C, M, S, MOVES: tl.constexpr, WEIGHED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, WN: tl.constexpr, WC: tl.constexpr,
):  # fmt: skip
    """Write the gradients of weight and bias, and, if x MOVES its moments, what else dx has.

    With D1 = sum dy and D2 = sum dy (x - mu_k) over the L values of a context, and r = 1 / sigma_k:
    dbias = D1, dweight = r D2, both over sqrt(lambda_k), and
    ``dx = A dy + spread (x - mu_k) + constant``, spread = -A r^2 D2 / L, constant = -A D1 / L.
    Of contexts whose moments are not the batch's, nothing else. Samples without a label have
    WEIGHED the contexts or not.
    """
    program, own = tl.program_id(0), K * tl.cdiv(C, BC)
    first, second, spread, constant = parts.split_dots(dots, N, R, C, S)
    centre, scale, _, rest = parts.split(tables, R, C)
    inverse, _, values, _, known_mean, known_var, weights = split_rest(rest, K, C)
    order, offsets = rows + N, rows + 2 * N
    if KP > 0:
        if program >= own:
            if MOVES:
                n = (program - own).to(tl.int64)
                if tl.load(rows + n) >= K:
                    posterior_gradients(
                        n, dots, known_mean, known_var, weight, bias, priors, centre, weights, eps,
                        N, R, K, C, M, S, KP, WN, WC,
                    )  # fmt: skip
            return
    k, c, at, ok = parts.take_row(program, C, BC)
    lo, hi = parts.find_parts_of(offsets, k, S)
    one, two = parts.add_dots(first, second, order, lo, hi, c, C, S, BN)
    by_weight = tl.load(inverse + at, ok, 0.0) * two
    if MOVES:
        count = tl.load(values + k)
        share = tl.where(count > 1.5, -1 / tl.maximum(count, 1.0), 0.0)
        minus = tl.load(scale + at, ok, 0.0) * share
        tl.store(spread + at, minus * tl.load(inverse + at, ok, 0.0) * by_weight, ok)
        tl.store(constant + at, minus * one, ok)
    if WEIGHED or k < K:
        root = tl.sqrt(tl.load(priors + k).to(tl.float32))
        by_weight /= root
        by_bias = one / root
        lo, hi = parts.find_parts_of(offsets, K, S)
        if WEIGHED:
            mu = tl.load(known_mean + at, ok, 0.0)
            one, two = add_weighted_dots(
                first, second, order, weights, centre, mu, lo, hi, k, c, K, C, S, BN
            )
            by_weight += two * tl.rsqrt(tl.load(known_var + at, ok, 1.0) + eps) / root
            by_bias += one / root
        elif (lo < hi) & (low <= k) & (k < high):
            # Samples without a label have a share of every context that is pooled.
            share = root / parts.add_priors(priors, low, high, BN)
            one, two = parts.add_dots(first, second, order, lo, hi, c, C, S, BN)
            by_weight += share * two * tl.load(inverse + K * C + c, ok, 0.0)
            by_bias += share * one
        tl.store(dweight + at, by_weight, ok)
        tl.store(dbias + at, by_bias, ok)
