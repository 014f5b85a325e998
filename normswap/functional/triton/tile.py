"""The kernels over x (N, C, *), as it lies in memory, that every stat-affine method is made of.

A program takes one instance, a block of BC channels and a part of the positions, tile by tile of
(BM, BC). Strides address both layouts; the one that is 1 is known to the compiler, so that
neighbours are read at once. All computes in float32; sums have a fixed order, without atomics.

Tables have one row for each instance, which `index` may name, -1 the last; `stride` lies between
rows, 0 where all instances have the same. A table that is None counts as 0. Geometry is C channels,
M positions, strides sn, sm, sc of instance, position and channel, S parts of PART positions.
"""

import triton
import triton.language as tl


@triton.jit
def place(C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr):
    """Return this program's instance, part, channels and positions, and how its tile is addressed.

    The offset of the first tile is int64; those within a tile fit into int32.
    """
    program, width = tl.program_id(0), tl.cdiv(C, BC)
    block, part, n = program % width, program // width % S, program // width // S
    lo = part * PART
    first = n.to(tl.int64) * sn + lo.to(tl.int64) * sm + (block * BC).to(tl.int64) * sc
    within = tl.arange(0, BM)[:, None] * sm + tl.arange(0, BC)[None, :] * sc
    return n, part, block * BC + tl.arange(0, BC), lo, tl.minimum(lo + PART, M), first, within


@triton.jit
def inside(i, hi, c, C, BM: tl.constexpr):
    """Return where the tile at position i holds values."""
    return (i + tl.arange(0, BM) < hi)[:, None] & (c < C)[None, :]


@triton.jit
def size_of_parts(C, BC: tl.constexpr):
    """Return how many values a table of the parts, (N, S, C), has."""
    return (tl.num_programs(0) // tl.cdiv(C, BC)).to(tl.int64) * C


@triton.jit
def find_row(index, si, n, K, stride):
    """Return the offset of the row of tables of an instance."""
    row = n.to(tl.int64)
    if index is not None:
        label = tl.load(index + n * si)
        row = tl.where(label < 0, K, label)
    return row * stride


@triton.jit
def load(table, at, ok):
    """Return a row of a table, to meet a tile."""
    if table is None:
        row = 0.0
    else:
        row = tl.load(table + at, ok, 0.0)[None, :]
    return row


@triton.jit(do_not_specialize=["K", "si", "S"])
def stats(
    x, found, index, si, K, C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Write mean and biased variance of each part, (2, N, S, C): x is read once.

    Tiles have moments about their own mean, which merge without loss of digits (Chan et al.).
    With an index, only of instances whose index is K or more.
    """
    n, part, c, lo, hi, at, within = place(C, M, sn, sm, sc, S, PART, BM, BC)
    if index is not None:
        if tl.load(index + n * si) < K:
            return
    x += at
    count = 0.0
    mu = tl.zeros([BC], tl.float32)
    squares = tl.zeros([BC], tl.float32)
    for i in range(lo, hi, BM):
        ok = inside(i, hi, c, C, BM)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        size = tl.minimum(hi - i, BM).to(tl.float32)
        m = tl.sum(v, 0) / size
        d = tl.where(ok, v - m[None, :], 0.0)
        share = size / (count + size)
        delta = m - mu
        mu += delta * share
        squares += tl.sum(d * d, 0) + delta * delta * count * share
        count += size
        x += BM * sm
    row = (n.to(tl.int64) * S + part) * C + c
    tl.store(found + row, mu, c < C)
    tl.store(found + size_of_parts(C, BC) + row, squares / count, c < C)


@triton.jit(do_not_specialize=["S"])
def merge(parts, mean, var, C, M, S, PART, BN: tl.constexpr, BC: tl.constexpr):
    """Write the moments (N, C) of what parts (2, N, S, C) make up, by the law of total variance."""
    width = tl.cdiv(C, BC)
    n = (tl.program_id(0) // width).to(tl.int64)
    c = tl.program_id(0) % width * BC + tl.arange(0, BC)
    part_var = parts + size_of_parts(C, BC) * S
    first, second = add_moments(parts, part_var, None, n * S, n * S + S, c, C, M, S, PART, BN)
    mu = first / M
    tl.store(mean + n * C + c, mu.to(tl.float32), c < C)
    tl.store(var + n * C + c, tl.maximum(second / M - mu * mu, 0.0).to(tl.float32), c < C)


@triton.jit
def add_moments(mean, var, order, lo, hi, c, C, M, S, PART, BN: tl.constexpr):
    """Return ``sum w m`` and ``sum w (v + m^2)`` of parts that hold w values, in float64.

    Of parts lo to hi, counted through the instances in the given order. In float64 no digits that
    float32 has are lost to a mean that is large against the spread.
    """
    one = tl.zeros(c.shape, tl.float64)
    two = tl.zeros(c.shape, tl.float64)
    for i in range(lo, hi, BN):
        at, part, ok = find_parts(order, i, hi, c, C, S, BN)
        size = tl.where(ok, tl.minimum(PART, M - part * PART)[:, None], 0).to(tl.float64)
        m = tl.load(mean + at, ok, 0.0).to(tl.float64)
        one += tl.sum(size * m, 0)
        two += tl.sum(size * (tl.load(var + at, ok, 0.0).to(tl.float64) + m * m), 0)
    return one, two


@triton.jit
def add_dots(first, second, order, lo, hi, c, C, S, BN: tl.constexpr):
    """Return the sums of two tables (N, S, C) over parts lo to hi, as `add_moments` counts them."""
    one = tl.zeros(c.shape, tl.float32)
    two = tl.zeros(c.shape, tl.float32)
    for i in range(lo, hi, BN):
        at, _, ok = find_parts(order, i, hi, c, C, S, BN)
        one += tl.sum(tl.load(first + at, ok, 0.0), 0)
        two += tl.sum(tl.load(second + at, ok, 0.0), 0)
    return one, two


@triton.jit
def find_parts_of(offsets, k, S):
    """Return which parts instances of context k have, first and last; int32 divides fast."""
    return tl.load(offsets + k).to(tl.int32) * S, tl.load(offsets + k + 1).to(tl.int32) * S


@triton.jit
def find_parts(order, i, hi, c, C, S, BN: tl.constexpr):
    """Return where BN parts from the i-th on lie in (N, S, C), which of S they are, and a mask."""
    j = i + tl.arange(0, BN)
    n, part = j // S, j % S
    if order is not None:
        n = tl.load(order + n, j < hi, 0)
    at = (n.to(tl.int64) * S + part)[:, None] * C + c[None, :]
    return at, part, (j < hi)[:, None] & (c < C)[None, :]


@triton.jit(do_not_specialize=["K", "si", "S"])
def apply(
    x, y, centre, scale, shift, index, si, K, stride,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - centre) * scale + shift``."""
    n, _, c, lo, hi, at, within = place(C, M, sn, sm, sc, S, PART, BM, BC)
    row, there = find_row(index, si, n, K, stride) + c, c < C
    m, s, t = load(centre, row, there), load(scale, row, there), load(shift, row, there)
    x += at
    y += at
    for i in range(lo, hi, BM):
        ok = inside(i, hi, c, C, BM)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        tl.store(y + within, ((v - m) * s + t).to(y.dtype.element_ty), ok)
        x += BM * sm
        y += BM * sm


@triton.jit(do_not_specialize=["K", "si", "S"])
def dots(
    dy, x, dx, found, centre, scale, index, si, K, stride,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write sums of dy and ``dy (x - centre)`` over each part, (2, N, S, C), and ``dx = dy scale``.

    The last only where there is a dx.
    """
    n, part, c, lo, hi, at, within = place(C, M, sn, sm, sc, S, PART, BM, BC)
    row, there = find_row(index, si, n, K, stride) + c, c < C
    m = load(centre, row, there)
    dy += at
    x += at
    if dx is not None:
        s = load(scale, row, there)
        dx += at
    one = tl.zeros([BC], tl.float32)
    two = tl.zeros([BC], tl.float32)
    for i in range(lo, hi, BM):
        ok = inside(i, hi, c, C, BM)
        g = tl.load(dy + within, ok, 0.0).to(tl.float32)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        one += tl.sum(g, 0)
        two += tl.sum(g * (v - m), 0)
        if dx is not None:
            tl.store(dx + within, (g * s).to(dx.dtype.element_ty), ok)
            dx += BM * sm
        dy += BM * sm
        x += BM * sm
    row = (n.to(tl.int64) * S + part) * C + c
    tl.store(found + row, one, there)
    tl.store(found + size_of_parts(C, BC) + row, two, there)


@triton.jit(do_not_specialize=["K", "si", "S"])
def combine(
    dy, x, dx, a, b, c0, centre, index, si, K, stride,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``dx = a dy + b (x - centre) + c0``."""
    n, _, c, lo, hi, at, within = place(C, M, sn, sm, sc, S, PART, BM, BC)
    row, there = find_row(index, si, n, K, stride) + c, c < C
    m, s, t, u = (
        load(centre, row, there),
        load(a, row, there),
        load(b, row, there),
        load(c0, row, there),
    )
    dy += at
    x += at
    dx += at
    for i in range(lo, hi, BM):
        ok = inside(i, hi, c, C, BM)
        g = tl.load(dy + within, ok, 0.0).to(tl.float32)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        # x first: what is left once the large numbers have cancelled is small, and rounds as such.
        tl.store(dx + within, ((v - m) * t + u + g * s).to(dx.dtype.element_ty), ok)
        dy += BM * sm
        x += BM * sm
        dx += BM * sm
