"""CN's kernels over tables (K + 1, C): of K contexts, and of samples without a label.

Where each of the latter weighs the contexts for itself, `posterior_kernels` write their rows.

A program takes one row and BC channels. It walks the instances of its context, which are sorted,
BN at a time. Contexts `low` to `high` are pooled for the samples without a label: all, one, or, if
that is an error, none, which makes their row NaN.
"""

import triton
import triton.language as tl

from normswap.functional.triton.posterior_kernels import add_weighted_dots
from normswap.functional.triton.tile import add_dots, add_moments, apply


@triton.jit
def take_row(C, BC: tl.constexpr):
    """Return this program's row, channels, and their place in a table."""
    width = tl.cdiv(C, BC)
    k = (tl.program_id(0) // width).to(tl.int64)
    c = tl.program_id(0) % width * BC + tl.arange(0, BC)
    return k, c, k * C + c, c < C


@triton.jit
def pool(
    mean, var, weight, bias, priors, low, high, c, C, LOG: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Return moments, gain and bias of contexts low to high as one Gaussian; moments in float64.

    With LOG, var holds the logarithm of the standard deviation.
    """
    total = tl.zeros(c.shape, tl.float64)
    one = tl.zeros(c.shape, tl.float64)
    two = tl.zeros(c.shape, tl.float64)
    gain = tl.zeros(c.shape, tl.float32)
    shift = tl.zeros(c.shape, tl.float32)
    for i in range(low, high, BN):
        k = i + tl.arange(0, BN)
        ok = (k < high)[:, None] & (c < C)[None, :]
        at = k.to(tl.int64)[:, None] * C + c[None, :]
        p = tl.load(priors + k, k < high, 0.0).to(tl.float64)[:, None]
        m = tl.load(mean + at, ok, 0.0).to(tl.float64)
        v = tl.load(var + at, ok, 0.0).to(tl.float64)
        if LOG:
            v = tl.exp(2 * v)
        total += tl.sum(p, 0)
        one += tl.sum(p * m, 0)
        two += tl.sum(p * (v + m * m), 0)
        if weight is not None:
            root = tl.sqrt(p.to(tl.float32))
            gain += tl.sum(root * tl.load(weight + at, ok, 0.0).to(tl.float32), 0)
            shift += tl.sum(root * tl.load(bias + at, ok, 0.0).to(tl.float32), 0)
    mu = one / total
    total32 = total.to(tl.float32)
    return mu, tl.maximum(two / total - mu * mu, 0.0), gain / total32, shift / total32


@triton.jit(do_not_specialize=["S", "K", "low", "high"])
def tables(
    running_mean, running_var, batches, weight, bias, priors, part_mean, part_var, order, offsets,
    centre, scale, shift, inverse, var, values, rates, known_mean, known_var,
    low, high, eps, momentum,
    K, C, M, S, PART, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the map of each row, ``y = (x - centre) * scale + shift``, and what it is made of.

    With moments of the batch where there are parts and a context has two values or more, else with
    the running ones. ``rates`` says how far the latter are to move; with a momentum of None, to the
    average of all batches. ``known``, if any, takes a copy of them, as they are to move.
    """
    k, c, at, ok = take_row(C, BC)
    mu = tl.zeros([BC], tl.float64)
    v = tl.zeros([BC], tl.float64)
    gain = tl.zeros([BC], tl.float32)
    bias_k = tl.zeros([BC], tl.float32)
    count = 0.0
    if k < K:
        root = tl.rsqrt(tl.load(priors + k).to(tl.float32))
        gain = tl.load(weight + at, ok, 0.0).to(tl.float32) * root
        bias_k = tl.load(bias + at, ok, 0.0).to(tl.float32) * root
        mu = tl.load(running_mean + at, ok, 0.0).to(tl.float64)
        v = tl.load(running_var + at, ok, 0.0).to(tl.float64)
        if known_mean is not None:
            tl.store(known_mean + at, mu.to(tl.float32), ok)
            tl.store(known_var + at, v.to(tl.float32), ok)
        if part_mean is not None:
            lo, hi = tl.load(offsets + k), tl.load(offsets + k + 1)
            number = (hi - lo) * M
            if number > 1:
                count = number.to(tl.float32)
                mu, two = add_moments(
                    part_mean, part_var, order, lo * S, hi * S, c, C, M, S, PART, BN
                )
                mu /= number
                v = tl.maximum(two / number - mu * mu, 0.0)
    else:
        needed = True
        if offsets is not None:
            needed = tl.load(offsets + K + 1) > tl.load(offsets + K)
        if needed:
            mu, v, gain, bias_k = pool(
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
    if tl.program_id(0) % tl.cdiv(C, BC) == 0:
        tl.store(values + k, count)
        if rates is not None:
            rate = 0.0
            if count > 1.5:
                if momentum is None:
                    rate = 1 / (tl.load(batches + k) + 1).to(tl.float32)
                else:
                    rate = momentum
            tl.store(rates + k, rate)


@triton.jit(do_not_specialize=["K", "si", "S"])
def apply_and_move(
    x, y, centre, scale, shift, index, si, K, stride,
    running_mean, running_var, batches, var, values, rates,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Do what `apply` does, and move the running statistics of contexts with moments.

    A launch after `tables` has read them for samples without a label.
    """
    apply(
        x, y, centre, scale, shift, index, si, K, stride, C, M, sn, sm, sc, S, PART, BM, BC
    )  # fmt: skip
    width = tl.cdiv(C, BC)
    for block in range(tl.program_id(0), K * width, tl.num_programs(0)):
        k, c = block // width, block % width * BC + tl.arange(0, BC)
        count, rate = tl.load(values + k), tl.load(rates + k)
        if count > 1.5:
            at, ok = k.to(tl.int64) * C + c, c < C
            new = tl.load(var + at, ok, 0.0) * (count / (count - 1))
            move(running_mean, tl.load(centre + at, ok, 0.0), rate, at, ok)
            move(running_var, new, rate, at, ok)
            if block % width == 0:
                tl.store(batches + k, tl.load(batches + k) + 1)


@triton.jit
def move(running, new, rate, at, ok):
    """Move a row of running statistics towards a new one."""
    old = tl.load(running + at, ok, 0.0).to(tl.float32)
    tl.store(running + at, (old + rate * (new - old)).to(running.dtype.element_ty), ok)


@triton.jit(do_not_specialize=["S", "K", "low", "high"])
def pull(
    first, second, order, offsets, inverse, scale, values, priors,
    weights, known_mean, known_var, centre, dweight, dbias, spread, constant, low, high, eps,
    K, C, S, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients of weight and bias, and what else than ``dy * scale`` dx has.

    With D1 = sum dy and D2 = sum dy (x - mu_k) over the L values of a context, and r = 1 / sigma_k:
    dbias = D1, dweight = r D2, both over sqrt(lambda_k), and
    ``dx = A dy + spread (x - mu_k) + constant``, spread = -A r^2 D2 / L, constant = -A D1 / L.
    Without a spread, and of contexts whose moments are not the batch's, nothing else.
    """
    k, c, at, ok = take_row(C, BC)
    lo, hi = tl.load(offsets + k) * S, tl.load(offsets + k + 1) * S
    one, two = add_dots(first, second, order, lo, hi, c, C, S, BN)
    by_weight = tl.load(inverse + at, ok, 0.0) * two
    if spread is not None:
        count = tl.load(values + k)
        share = tl.where(count > 1.5, -1 / tl.maximum(count, 1.0), 0.0)
        minus = tl.load(scale + at, ok, 0.0) * share
        tl.store(spread + at, minus * tl.load(inverse + at, ok, 0.0) * by_weight, ok)
        tl.store(constant + at, minus * one, ok)
    if k < K:
        root = tl.sqrt(tl.load(priors + k).to(tl.float32))
        by_weight /= root
        by_bias = one / root
        lo, hi = tl.load(offsets + K) * S, tl.load(offsets + K + 1) * S
        if weights is not None:
            mu = tl.load(known_mean + at, ok, 0.0)
            one, two = add_weighted_dots(
                first, second, order, weights, centre, mu, lo, hi, k, c, K, C, S, BN
            )
            by_weight += two * tl.rsqrt(tl.load(known_var + at, ok, 1.0) + eps) / root
            by_bias += one / root
        elif (lo < hi) & (low <= k) & (k < high):
            # Samples without a label have a share of every context that is pooled.
            share = root / add_priors(priors, low, high, BN)
            one, two = add_dots(first, second, order, lo, hi, c, C, S, BN)
            by_weight += share * two * tl.load(inverse + K * C + c, ok, 0.0)
            by_bias += share * one
        tl.store(dweight + at, by_weight.to(dweight.dtype.element_ty), ok)
        tl.store(dbias + at, by_bias.to(dbias.dtype.element_ty), ok)


@triton.jit
def add_priors(priors, low, high, BN: tl.constexpr):
    """Return the sum of the priors of contexts low to high."""
    total = 0.0
    for i in range(low, high, BN):
        k = i + tl.arange(0, BN)
        total += tl.sum(tl.load(priors + k, k < high, 0.0).to(tl.float32), 0)
    return total
