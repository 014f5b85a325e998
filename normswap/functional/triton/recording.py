"""Autograd around launches: one Function for every method that starts its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional.backend import untraced
from normswap.functional.tables import differentiate_again, needs_formula, records

# Tensors, some of which may be None.
Tensors = Sequence[Any]


class Operator(NamedTuple):
    """What computes a method, from inputs, x (N, C, *) first, and what else is given.

    Attributes:
        forward: from inputs and given to y, and what else backward needs: tensors.
        backward: from dy, inputs, those tensors, given, and which gradients are needed, to these.
        formula: y in torch's operators, from inputs, those tensors and given.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Tensors]
    formula: Callable[..., Tensor]


def run(operator: Operator, given: Any, *inputs: Tensor | None) -> Tensor:
    """Return y, recorded only where autograd asks for that."""
    if records([t for t in inputs if t is not None]):
        return record(operator, given, *inputs)
    return operator.forward(inputs, given)[0]


def record(operator: Operator, given: Any, *inputs: Tensor | None) -> Tensor:
    """Return y, as a Function that autograd may record; in inference mode there are none."""
    if torch.is_inference_mode_enabled():
        return operator.forward(inputs, given)[0]
    y: Tensor = _Recorded.apply(operator, given, *inputs)
    return y


class _Recorded(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.operator, ctx.given, *inputs = args
        y, *kept = ctx.operator.forward(inputs, ctx.given)
        # All that depends on x is saved as tensors are: checkpointing computes all of it anew.
        ctx.save_for_backward(*inputs, *kept)
        ctx.count = len(inputs)
        found: Tensor = y
        return found

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        inputs, kept = saved[: ctx.count], saved[ctx.count :]
        if not needs_formula(grads[0]):
            return None, None, *ctx.operator.backward(grads[0], inputs, kept, ctx.given, needed)

        def formula(*inputs: Tensor | None) -> Any:
            return ctx.operator.formula(inputs, kept, ctx.given)

        return None, None, *differentiate_again(formula, inputs, grads[0], needed)
