"""CrossNorm by Triton: two launches forward, two backward.

Styles are exchanged inside the passes that apply them. A program adds up itself what all parts of
its channels left, and those of the channels theirs are exchanged with: these are few.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.affine import Centred
from normswap.functional.moments import instance_moments
from normswap.functional.stat_maps import Glue
from normswap.functional.tables import apply_centred_by_formula
from normswap.functional.triton import sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.parts import add_dots, add_moments
from normswap.functional.triton.plan import Plan, plan, pow2
from normswap.functional.triton.recording import Operator, Tensors, run
from normswap.functional.triton.tile import locate, write_map, write_sum


@triton.jit
def other(permutation, n, c, C, CHANNELS):
    """Return the instance and channels that a permutation, of instances or channels, names."""
    if CHANNELS:
        c = tl.load(permutation + c, c < C, 0)
    else:
        n = tl.load(permutation + n)
    return n.to(tl.int64), c


@triton.jit
def style(mean, var, n, c, C, M, S, PART, eps, SB):
    """Return mean and unbiased standard deviation of what parts (N, S, C) make up."""
    first = n * S * C
    one, two = add_moments(mean + first, var + first, None, 0, S, c, C, M, S, PART, SB)
    m = one / M
    return m.to(tl.float32), tl.sqrt(tl.maximum(two - one * m, 0.0) / (M - 1) + eps).to(tl.float32)


@triton.jit(do_not_specialize=["S"])
def exchange(
    x, y, mean, var, permutation, inverted, centre, deviation, scale, eps,
    C, M, sn, sm, sc, S, PART,
    CHANNELS: tl.constexpr, SB: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - m) sd_o / sd + m_o``; for backward m, sd, sd_o / sd, the inverted order."""
    tiles = locate(C, M, sn, sm, sc, S, PART, BM, BC)
    n, part, c = tiles[0].to(tl.int64), tiles[1], tiles[2]
    m, sd = style(mean, var, n, c, C, M, S, PART, eps, SB)
    n_o, c_o = other(permutation, n, c, C, CHANNELS)
    t, ratio = style(mean, var, n_o, c_o, C, M, S, PART, eps, SB)
    ratio /= sd
    if part == 0:
        row = n * C + c
        tl.store(centre + row, m, c < C)
        tl.store(deviation + row, sd, c < C)
        tl.store(scale + row, ratio, c < C)
        if not CHANNELS:
            tl.store(inverted + n_o, n)
        elif n == 0:
            tl.store(inverted + c_o, c.to(tl.int64), c < C)
    write_map(x, y, m[None, :], ratio[None, :], t[None, :], tiles, C, sm, BM)


@triton.jit(do_not_specialize=["S"])
def differentiate(
    dy, x, dx, first, second, inverted, centre, deviation, scale,
    C, M, sn, sm, sc, S, PART,
    CHANNELS: tl.constexpr, SB: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write dx: through the map, the own statistics, and those of the channel it gave its style."""
    tiles = locate(C, M, sn, sm, sc, S, PART, BM, BC)
    n, c, there = tiles[0].to(tl.int64), tiles[2], tiles[2] < C
    row = n * C + c
    m, sd = tl.load(centre + row, there, 0.0), tl.load(deviation + row, there, 1.0)
    a = tl.load(scale + row, there, 0.0)
    n_o, c_o = other(inverted, n, c, C, CHANNELS)
    at, at_o = n * S * C, n_o * S * C
    one, two = add_dots(first + at, second + at, None, 0, S, c, C, S, SB)
    one_o, two_o = add_dots(first + at_o, second + at_o, None, 0, S, c_o, C, S, SB)
    b = (two_o / tl.load(deviation + n_o * C + c_o, there, 1.0) - two / sd * a) / sd / (M - 1)
    t = (one_o - a * one) / M
    write_sum(dy, x, dx, m[None, :], a[None, :], b[None, :], t[None, :], tiles, C, sm, BM)


def exchange_styles(x: Tensor, permutation: Tensor, axis: int, eps: float, glue: Glue) -> Tensor:
    """Return x with each channel's style that of another; see `normswap.functional.style`.

    The permutation is of instances (axis 0) or channels (axis 1); the glue is the same in torch's
    operators, for derivatives of the derivative.
    """
    return run(_OPERATOR, (permutation, axis, eps, glue), x)


def _blocks(cut: Plan, axis: int) -> dict[str, int]:
    return {"CHANNELS": axis, "SB": min(pow2(cut.splits), 32), **cut.blocks}


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    """Return y, the inverse permutation, and mean, deviation and scale, (3, N, C)."""
    (x,), (permutation, axis, eps, _) = inputs, given
    cut, parts, y = plan(x), sweeps.part_stats(x), torch.empty_like(x)
    inverse, kept = torch.empty_like(permutation), parts.new_empty(3, *x.shape[:2])
    launch(
        exchange,
        cut.programs,
        *(x, y, *parts.unbind(), permutation, inverse, *kept, eps, cut.geometry),
        **_blocks(cut, axis),
    )
    return y, inverse, kept


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    """See `normswap.functional.glue.ExchangeGlue` for the formulas."""
    (x,), (inverse, table) = inputs, kept
    cut, dy, dx = plan(x), kernels.match(dy, x), torch.empty_like(x)
    sums = sweeps.part_dots(dy, x, table[0])[1].unbind()
    launch(
        differentiate,
        cut.programs,
        *(dy, x, dx, *sums, inverse, *table, cut.geometry),
        **_blocks(cut, given[1]),
    )
    return (dx,)


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x,), instances = inputs, instance_moments(inputs[0])
    return apply_centred_by_formula(x, Centred(instances.mean, *given[3](instances, replay=True)))


_OPERATOR = Operator(_forward, _backward, _formula)
