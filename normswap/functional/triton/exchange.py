"""CrossNorm by Triton: two launches forward, two backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.affine import Centred
from normswap.functional.fused import Glue
from normswap.functional.moments import instance_moments
from normswap.functional.tables import apply_centred_by_formula
from normswap.functional.triton import exchange_kernels, sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Plan, plan, power
from normswap.functional.triton.recording import Way, run


def exchange_styles(x: Tensor, permutation: Tensor, axis: int, eps: float, glue: Glue) -> Tensor:
    """Return x with each channel's style that of another; see `normswap.functional.style`.

    Args:
        x: (N, C, *), of at least two positions.
        permutation: int64, of instances (axis 0) or channels (axis 1).
        axis: which.
        eps: added to the variance, under the root.
        glue: the same in torch's operators, for derivatives of the derivative.
    """
    return run(_WAY, (permutation, axis, eps, glue), x)


def _blocks(cut: Plan, axis: int) -> dict[str, int]:
    return {"CHANNELS": axis, "SB": min(power(cut.splits), 32), **cut.blocks}


def _forward(inputs: Sequence[Tensor], given: Any) -> tuple[Tensor, ...]:
    """Return y, the inverse permutation, and mean, deviation and scale, (3, N, C)."""
    (x,), (permutation, axis, eps, _) = inputs, given
    cut, parts, y = plan(x), sweeps.part_stats(x), torch.empty_like(x)
    inverse, kept = torch.empty_like(permutation), parts.new_empty(3, *x.shape[:2])
    launch(
        exchange_kernels.exchange,
        cut.programs,
        *(x, y, *parts.unbind(), permutation, inverse, *kept, eps, cut.geometry),
        **_blocks(cut, axis),
    )
    return y, inverse, kept


def _backward(
    dy: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], given: Any, needed: Any
) -> tuple[Tensor]:
    """See `normswap.functional.glue.ExchangeGlue` for the formulas."""
    (x,), (inverse, table) = inputs, kept
    cut, dy, dx = plan(x), kernels.match(dy, x), torch.empty_like(x)
    sums = sweeps.part_dots(dy, x, table[0])[1].unbind()
    launch(
        exchange_kernels.differentiate,
        cut.programs,
        *(dy, x, dx, *sums, inverse, *table, cut.geometry),
        **_blocks(cut, given[1]),
    )
    return (dx,)


def _formula(inputs: Sequence[Tensor], kept: Sequence[Tensor], given: Any) -> Tensor:
    (x,), instances = inputs, instance_moments(inputs[0])
    return apply_centred_by_formula(x, Centred(instances.mean, *given[3](instances, replay=True)))


_WAY = Way(_forward, _backward, _formula)
