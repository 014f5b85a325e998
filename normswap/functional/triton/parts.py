"""What programs over tables share: of rows, (R, C), and of parts of the positions, (N, S, C)."""

import triton
import triton.language as tl


@triton.jit
def take_row(program, C, BC):
    """Return a program's row, channels, and their place in a table."""
    width = tl.cdiv(C, BC)
    k = (program // width).to(tl.int64)
    c = program % width * BC + tl.arange(0, BC)
    return k, c, k * C + c, c < C


@triton.jit
def split(tables, R, C):
    """Return centre, scale, shift, and what lies behind them."""
    size = R.to(tl.int64) * C
    return tables, tables + size, tables + 2 * size, tables + 3 * size


@triton.jit
def split_dots(dots, N, R, C, S):
    """Return sums of parts, of dy and ``dy (x - centre)``, and spread and constant, behind them."""
    size = N.to(tl.int64) * S * C
    spread = dots + 2 * size
    return dots, dots + size, spread, spread + R.to(tl.int64) * C


@triton.jit
def size_of_parts(C, BC):
    """Return how many values a table of the parts has, in a launch over them all."""
    return (tl.num_programs(0) // tl.cdiv(C, BC)).to(tl.int64) * C


@triton.jit
def load_f64(table, at, ok):
    """Return what a table holds in float64."""
    return tl.load(table + at, ok, 0.0).to(tl.float64)


@triton.jit
def find_parts_of(offsets, k, S):
    """Return which parts instances of context k have, first and last; int32 divides fast."""
    return tl.load(offsets + k).to(tl.int32) * S, tl.load(offsets + k + 1).to(tl.int32) * S


@triton.jit
def find_parts(order, i, hi, c, C, S, BN):
    """Return where BN parts from the i-th on lie, which of their instance they are, and a mask.

    They are counted through the instances in the given order; without one, as they lie.
    """
    j = i + tl.arange(0, BN)
    if order is None:
        row, part = j.to(tl.int64), j
    else:
        n, part = j // S, j % S
        row = tl.load(order + n, j < hi, 0) * S + part
    return row[:, None] * C + c[None, :], part, (j < hi)[:, None] & (c < C)[None, :]


@triton.jit
def add_moments(mean, var, order, lo, hi, c, C, M, S, PART, BN):
    """Return ``sum w m`` and ``sum w (v + m^2)`` of parts lo to hi, which hold w values.

    In float64: no digits that float32 has are lost to a mean that is large against the spread.
    """
    one, two = tl.zeros(c.shape, tl.float64), tl.zeros(c.shape, tl.float64)
    for i in range(lo, hi, BN):
        at, part, ok = find_parts(order, i, hi, c, C, S, BN)
        size = tl.where(ok, tl.minimum(PART, M - part * PART)[:, None], 0).to(tl.float64)
        m = load_f64(mean, at, ok)
        one += tl.sum(size * m, 0)
        two += tl.sum(size * (load_f64(var, at, ok) + m * m), 0)
    return one, two


@triton.jit
def add_dots(first, second, order, lo, hi, c, C, S, BN):
    """Return the sums of two tables over parts lo to hi."""
    one, two = tl.zeros(c.shape, tl.float32), tl.zeros(c.shape, tl.float32)
    for i in range(lo, hi, BN):
        at, _, ok = find_parts(order, i, hi, c, C, S, BN)
        one += tl.sum(tl.load(first + at, ok, 0.0), 0)
        two += tl.sum(tl.load(second + at, ok, 0.0), 0)
    return one, two


@triton.jit(do_not_specialize=["S"])
def merge(parts, mean, var, C, M, S, PART, BN: tl.constexpr, BC: tl.constexpr):
    """Write the moments (N, C) of what parts (2, N, S, C) make up, by the law of total variance."""
    n, c, at, ok = take_row(tl.program_id(0), C, BC)
    parts += n * S * C
    first, second = add_moments(
        parts, parts + size_of_parts(C, BC) * S, None, 0, S, c, C, M, S, PART, BN
    )
    mu = first / M
    tl.store(mean + at, mu, ok)
    tl.store(var + at, tl.maximum(second / M - mu * mu, 0.0), ok)


@triton.jit
def pool(mean, var, weight, bias, priors, low, high, c, C, LOG, BN):
    """Return moments, gain and bias of contexts low to high as one Gaussian; moments in float64.

    With LOG, var holds the logarithm of the standard deviation.
    """
    total = tl.zeros(c.shape, tl.float64)
    one, two = tl.zeros_like(total), tl.zeros_like(total)
    gain, shift = tl.zeros(c.shape, tl.float32), tl.zeros(c.shape, tl.float32)
    for i in range(low, high, BN):
        k = i + tl.arange(0, BN)
        ok = (k < high)[:, None] & (c < C)[None, :]
        at = k.to(tl.int64)[:, None] * C + c[None, :]
        p = load_f64(priors, k, k < high)[:, None]
        m, v = load_f64(mean, at, ok), load_f64(var, at, ok)
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


@triton.jit
def add_priors(priors, low, high, BN):
    """Return the sum of the priors of contexts low to high."""
    total = 0.0
    for i in range(low, high, BN):
        k = i + tl.arange(0, BN)
        total += tl.sum(tl.load(priors + k, k < high, 0.0).to(tl.float32), 0)
    return total
