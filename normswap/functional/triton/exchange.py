"""CrossNorm by Triton: two launches forward, two backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import kernels
from normswap.functional.fused import Glue, differentiate
from normswap.functional.tables import records
from normswap.functional.triton import exchange_kernels, sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Plan, plan, power


def exchange_styles(x: Tensor, permutation: Tensor, axis: int, eps: float, glue: Glue) -> Tensor:
    """Return x with each channel's style that of another; see `normswap.functional.style`.

    Args:
        x: (N, C, *), of at least two positions.
        permutation: int64, of instances (axis 0) or channels (axis 1).
        axis: which.
        eps: added to the variance, under the root.
        glue: the same in torch's operators, for derivatives of the derivative.
    """
    if not records((x,)):
        return _exchange(x, permutation, axis, eps)[0]
    y: Tensor = _Exchange.apply(x, permutation, axis, eps, glue)
    return y


def _blocks(cut: Plan, axis: int) -> dict[str, int]:
    return {"CHANNELS": axis, "SB": min(power(cut.splits), 32), **cut.blocks}


def _exchange(x: Tensor, permutation: Tensor, axis: int, eps: float) -> tuple[Tensor, ...]:
    """Return y, the inverse permutation, and mean, deviation and scale, (3, N, C)."""
    cut, parts, y = plan(x), sweeps.part_stats(x), torch.empty_like(x)
    inverse, kept = torch.empty_like(permutation), parts.new_empty(3, *x.shape[:2])
    launch(
        exchange_kernels.exchange,
        cut.programs,
        *(x, y, *parts.unbind(), permutation, inverse, *kept, eps, cut.geometry),
        **_blocks(cut, axis),
    )
    return y, inverse, kept


class _Exchange(Function):
    """See `normswap.functional.glue.ExchangeGlue` for the formulas."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, permutation, ctx.axis, eps, ctx.glue = inputs
        y, *kept = _exchange(x, permutation, ctx.axis, eps)
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, inverse, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiate(x, ctx.glue, (), grads[0], (True,)), *[None] * 4
        cut, dy, dx = plan(x), kernels.match(grads[0], x), torch.empty_like(x)
        sums = sweeps.part_dots(dy, x, kept[0])[1].unbind()
        launch(
            exchange_kernels.differentiate,
            cut.programs,
            *(dy, x, dx, *sums, inverse, *kept, cut.geometry),
            **_blocks(cut, ctx.axis),
        )
        return dx, *[None] * 4
