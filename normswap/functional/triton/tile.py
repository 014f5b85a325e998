"""The kernels over x (N, C, *), as it lies in memory, that every stat-affine method is made of.

A program takes one instance, a block of BC channels and a part of the positions, tile by tile of
(BM, BC). Strides address both layouts; the one that is 1 is known to the compiler, so that
neighbours are read at once. All computes in float32; sums have a fixed order, without atomics.

Geometry is C channels, M positions, strides sn, sm, sc of instance, position and channel, S parts
of PART positions. Tables have one row for each instance, which `index` may name, -1 row K;
`stride` lies between rows, 0 where all instances have the same. A table that is None counts as 0.
With an R, `centre` is the first of all tables, (R, C) each, which lie one after the other: a
layer's are allocated, saved and handed to a launch at once.
"""

import triton
import triton.language as tl

from normswap.functional.triton.parts import size_of_parts, split


@triton.jit
def locate(C, M, sn, sm, sc, S, PART, BM, BC):
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
def mask_of(i, hi, c, C, BM):
    """Return where the tile at position i holds values."""
    return (i + tl.arange(0, BM) < hi)[:, None] & (c < C)[None, :]


@triton.jit
def row_offset(index, si, n, K, stride):
    """Return the offset of the row of tables of an instance."""
    row = n.to(tl.int64)
    if index is not None:
        label = tl.load(index + n * si)
        row = tl.where(label < 0, K, label)
    return row * stride


@triton.jit
def load_row(table, at, ok):
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
    n, part, c, lo, hi, at, within = locate(C, M, sn, sm, sc, S, PART, BM, BC)
    if index is not None:
        if tl.load(index + n * si) < K:
            return
    x += at
    count, mu, squares = 0.0, tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for i in range(lo, hi, BM):
        ok = mask_of(i, hi, c, C, BM)
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


@triton.jit(do_not_specialize=["R", "K", "si", "S"])
def apply(
    x, y, centre, index, scale, shift, si, R, K, stride,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - centre) * scale + shift``.

    With an R and no index the first instance has row K; others have that, or those after it.
    """
    if R is not None:
        if index is None:
            centre += K.to(tl.int64) * C
        centre, scale, shift, _ = split(centre, R, C)
    tiles = locate(C, M, sn, sm, sc, S, PART, BM, BC)
    n, c = tiles[0], tiles[2]
    row, there = row_offset(index, si, n, K, stride) + c, c < C
    m, s, t = load_row(centre, row, there), load_row(scale, row, there), load_row(shift, row, there)
    write_map(x, y, m, s, t, tiles, C, sm, BM)


@triton.jit
def write_map(x, y, m, s, t, tiles, C, sm, BM):
    """Write ``y = (x - m) * s + t`` in the tiles of a program, that `locate` returned."""
    _, _, c, lo, hi, at, within = tiles
    x, y = x + at, y + at
    for i in range(lo, hi, BM):
        ok = mask_of(i, hi, c, C, BM)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        tl.store(y + within, (v - m) * s + t, ok)
        x, y = x + BM * sm, y + BM * sm


@triton.jit(do_not_specialize=["R", "K", "S"])
def dots(
    dy, x, dx, found, centre, index, scale, stride, R, K,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write sums of dy and ``dy (x - centre)`` over each part, (2, N, S, C), and ``dx = dy scale``.

    The last only where there is a dx.
    """
    if R is not None:
        centre, scale, _, _ = split(centre, R, C)
        stride = C
    n, part, c, lo, hi, at, within = locate(C, M, sn, sm, sc, S, PART, BM, BC)
    row, there = row_offset(index, 1, n, K, stride) + c, c < C
    m = load_row(centre, row, there)
    dy, x = dy + at, x + at
    if dx is not None:
        s = load_row(scale, row, there)
        dx += at
    one, two = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for i in range(lo, hi, BM):
        ok = mask_of(i, hi, c, C, BM)
        g = tl.load(dy + within, ok, 0.0).to(tl.float32)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        one += tl.sum(g, 0)
        two += tl.sum(g * (v - m), 0)
        if dx is not None:
            tl.store(dx + within, g * s, ok)
            dx += BM * sm
        dy, x = dy + BM * sm, x + BM * sm
    row = (n.to(tl.int64) * S + part) * C + c
    tl.store(found + row, one, there)
    tl.store(found + size_of_parts(C, BC) + row, two, there)


@triton.jit(do_not_specialize=["R", "K", "S"])
def combine(
    dy, x, dx, spread, constant, centre, index, scale, stride, R, K,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``dx = scale dy + spread (x - centre) + constant``.

    With an R, the last two lie behind what `dots` found, which is given as the first of them.
    """
    if R is not None:
        centre, scale, _, _ = split(centre, R, C)
        spread += 2 * size_of_parts(C, BC)
        constant = spread + R.to(tl.int64) * C
        stride = C
    tiles = locate(C, M, sn, sm, sc, S, PART, BM, BC)
    n, c = tiles[0], tiles[2]
    row, there = row_offset(index, 1, n, K, stride) + c, c < C
    m, s, t = (
        load_row(centre, row, there),
        load_row(scale, row, there),
        load_row(spread, row, there),
    )
    write_sum(dy, x, dx, m, s, t, load_row(constant, row, there), tiles, C, sm, BM)


@triton.jit
def write_sum(dy, x, dx, m, s, t, u, tiles, C, sm, BM):
    """Write ``dx = s dy + t (x - m) + u``, as `write_map` does."""
    _, _, c, lo, hi, at, within = tiles
    dy, x, dx = dy + at, x + at, dx + at
    for i in range(lo, hi, BM):
        ok = mask_of(i, hi, c, C, BM)
        g = tl.load(dy + within, ok, 0.0).to(tl.float32)
        v = tl.load(x + within, ok, 0.0).to(tl.float32)
        # x first: what is left once the large numbers have cancelled is small, and rounds as such.
        tl.store(dx + within, (v - m) * t + u + g * s, ok)
        dy, x, dx = dy + BM * sm, x + BM * sm, dx + BM * sm
