"""The kernels of `tile` where centre, scale and shift lie one after the other, (R, C) each.

So all tables of a layer are one tensor: allocated, saved and handed to a launch at once. `rows`,
(N,), names the row of each instance, -1 row K. Without it the first instance has row K, and all
others have the same if the stride is 0, else those after it.
"""

import triton
import triton.language as tl

from normswap.functional.triton import tile


@triton.jit
def take_row(program, C, BC: tl.constexpr):
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


@triton.jit(do_not_specialize=["R", "K", "si", "S"])
def apply(
    x, y, tables, rows, si, R, K, stride,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - centre) * scale + shift``."""
    if rows is None:
        tables += K.to(tl.int64) * C
    centre, scale, shift, _ = split(tables, R, C)
    tile.apply(
        x, y, centre, scale, shift, rows, si, K, stride, C, M, sn, sm, sc, S, PART, BM, BC
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "K", "S"])
def dots(
    dy, x, dx, found, tables, rows, R, K,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write what `tile.dots` does."""
    centre, scale, _, _ = split(tables, R, C)
    tile.dots(
        dy, x, dx, found, centre, scale, rows, 1, K, C, C, M, sn, sm, sc, S, PART, BM, BC
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "K", "S"])
def combine(
    dy, x, dx, found, tables, rows, R, K,
    C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``dx = scale dy + spread (x - centre) + constant``.

    The last two, (R, C), lie behind what `dots` found.
    """
    centre, scale, _, _ = split(tables, R, C)
    spread = found + 2 * tile.size_of_parts(C, BC)
    constant = spread + R.to(tl.int64) * C
    tile.combine(
        dy, x, dx, scale, spread, constant, centre, rows, 1, K, C,
        C, M, sn, sm, sc, S, PART, BM, BC,
    )  # fmt: skip
