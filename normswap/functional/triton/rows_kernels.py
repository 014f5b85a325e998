"""The kernels of `tile` where centre, scale and shift lie one after the other, (R, C) each.

So all tables of a layer are one tensor: allocated, saved and handed to a launch at once. `rows`,
(N,), names the row of each instance, -1 row K. Without it the first instance has row K, and all
others have the same if the stride is 0, else those after it.
"""

import triton
import triton.language as tl

from normswap.functional.triton import tile
from normswap.functional.triton.parts import size_of_parts, split


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
        dy, x, dx, found, centre, scale, rows, K, C, C, M, sn, sm, sc, S, PART, BM, BC
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
    spread = found + 2 * size_of_parts(C, BC)
    constant = spread + R.to(tl.int64) * C
    tile.combine(
        dy, x, dx, scale, spread, constant, centre, rows, K, C,
        C, M, sn, sm, sc, S, PART, BM, BC,
    )  # fmt: skip
