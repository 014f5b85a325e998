"""CrossNorm's exchange of styles inside the passes that apply it; `exchange` launches them.

A program takes a part of one instance, as those of `tile` do, and adds up itself what all parts of
the channels left, and those of the channels theirs are exchanged with: these are few.
"""

import triton
import triton.language as tl

from normswap.functional.triton.tile import inside, place


@triton.jit
def other(permutation, n, c, C, CHANNELS: tl.constexpr):
    """Return the instance and channels that a permutation, of instances or channels, names."""
    if CHANNELS:
        c = tl.load(permutation + c, c < C, 0)
    else:
        n = tl.load(permutation + n)
    return n, c


@triton.jit
def cell(n, c, C):
    """Return where channels of an instance lie in a table (N, C)."""
    return n.to(tl.int64) * C + c


@triton.jit
def style(mean, var, n, c, C, M, S, PART, eps, SB: tl.constexpr):
    """Return mean and unbiased standard deviation of what parts (N, S, C) make up."""
    one = tl.zeros(c.shape, tl.float64)
    two = tl.zeros(c.shape, tl.float64)
    for i in range(0, S, SB):
        s = i + tl.arange(0, SB)[:, None]
        at, ok = (n.to(tl.int64) * S + s) * C + c[None, :], (s < S) & (c < C)[None, :]
        size = tl.where(ok, tl.minimum(PART, M - s * PART), 0).to(tl.float64)
        m = tl.load(mean + at, ok, 0.0).to(tl.float64)
        one += tl.sum(size * m, 0)
        two += tl.sum(size * (tl.load(var + at, ok, 0.0).to(tl.float64) + m * m), 0)
    m = one / M
    return m.to(tl.float32), tl.sqrt(tl.maximum(two - one * m, 0.0) / (M - 1) + eps).to(tl.float32)


@triton.jit
def total(sums, n, c, C, S, SB: tl.constexpr):
    """Return the sum of parts (N, S, C)."""
    found = tl.zeros(c.shape, tl.float32)
    for i in range(0, S, SB):
        s = i + tl.arange(0, SB)[:, None]
        at, ok = (n.to(tl.int64) * S + s) * C + c[None, :], (s < S) & (c < C)[None, :]
        found += tl.sum(tl.load(sums + at, ok, 0.0), 0)
    return found


@triton.jit(do_not_specialize=["S"])
def exchange(
    x, y, mean, var, permutation, inverted, centre, deviation, scale, eps,
    C, M, sn, sm, sc, S, PART,
    CHANNELS: tl.constexpr, SB: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - m) sd_o / sd + m_o``; for backward m, sd, sd_o / sd, the inverted order."""
    n, part, c, lo, hi, at, within = place(C, M, sn, sm, sc, S, PART, BM, BC)
    m, sd = style(mean, var, n, c, C, M, S, PART, eps, SB)
    n_o, c_o = other(permutation, n, c, C, CHANNELS)
    t, ratio = style(mean, var, n_o, c_o, C, M, S, PART, eps, SB)
    ratio /= sd
    if part == 0:
        row = cell(n, c, C)
        tl.store(centre + row, m, c < C)
        tl.store(deviation + row, sd, c < C)
        tl.store(scale + row, ratio, c < C)
        if CHANNELS:
            tl.store(inverted + c_o, c.to(tl.int64), (c < C) & (n == 0))
        else:
            tl.store(inverted + n_o, n.to(tl.int64))
    x += at
    y += at
    for i in range(lo, hi, BM):
        ok = inside(i, hi, c, C, BM)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        found = (v - m[None, :]) * ratio[None, :] + t[None, :]
        tl.store(y + within, found.to(y.dtype.element_ty), ok)
        x += BM * sm
        y += BM * sm


@triton.jit(do_not_specialize=["S"])
def differentiate(
    dy, x, dx, first, second, inverted, centre, deviation, scale,
    C, M, sn, sm, sc, S, PART,
    CHANNELS: tl.constexpr, SB: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write dx: through the map, the own statistics, and those of the channel it gave its style."""
    n, _, c, lo, hi, at, within = place(C, M, sn, sm, sc, S, PART, BM, BC)
    there, row = c < C, cell(n, c, C)
    m, sd = tl.load(centre + row, there, 0.0), tl.load(deviation + row, there, 1.0)
    a = tl.load(scale + row, there, 0.0)
    n_o, c_o = other(inverted, n, c, C, CHANNELS)
    given = total(second, n_o, c_o, C, S, SB) / tl.load(deviation + cell(n_o, c_o, C), there, 1.0)
    b = (given - total(second, n, c, C, S, SB) / sd * a) / sd / (M - 1)
    t = (total(first, n_o, c_o, C, S, SB) - a * total(first, n, c, C, S, SB)) / M
    dy += at
    x += at
    dx += at
    for i in range(lo, hi, BM):
        ok = inside(i, hi, c, C, BM)
        g = tl.load(dy + within, ok, 0.0).to(tl.float32)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        found = (v - m[None, :]) * b[None, :] + t[None, :] + g * a[None, :]
        tl.store(dx + within, found.to(dx.dtype.element_ty), ok)
        dy += BM * sm
        x += BM * sm
        dx += BM * sm
