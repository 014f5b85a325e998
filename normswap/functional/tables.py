"""Affine maps of x by tables: one sweep a pass, x the only tensor of its size that is saved."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import kernels
from normswap.functional.affine import Affine, Centred
from normswap.functional.backend import is_eager, is_torchs_own, no_autocast, triton_for, untraced
from normswap.functional.label_rows import one_label
from normswap.functional.moments import as_dtype, compute_dtype, pick_rows, segment_sum


def uses_kernels(x: Tensor) -> bool:
    """Return whether x can go through the kernels here and now."""
    return is_eager() and is_torchs_own(x) and kernels.suits(x)


def records(tensors: Sequence[Tensor]) -> bool:
    """Return whether autograd records what is done with these tensors.

    In inference mode it does not, even where gradients are switched on inside.
    """
    recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return recorded and any(t.requires_grad for t in tensors)


def needs_formula(dy: Tensor) -> bool:
    """Return whether backward is itself to be differentiated, or is run for several dy at once."""
    several: bool = torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched=True
    return torch.is_grad_enabled() or several or not is_eager()


def differentiate_again(
    formula: Callable[..., Tensor], inputs: Sequence[Any], dy: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of a formula by torch's own derivatives, with a graph if asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(dy):
        # As views: of inputs that depend on each other, each is to be held fixed for the others.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        y = formula(*inputs)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


def apply_centred_by_formula(x: Tensor, table: Centred) -> Tensor:
    """Compute `apply_centred` with torch's own derivatives."""
    shape = table.scale.shape + (1,) * (x.dim() - 2)
    dtype = compute_dtype(x)
    centre, scale, shift = (t.to(dtype).reshape(shape) for t in table)
    return torch.addcmul(shift, x.to(dtype) - centre, scale).to(x.dtype)


def apply_centred(x: Tensor, table: Centred, index: Tensor | None = None) -> Tensor:
    """Return ``(x - centre) * scale + shift`` in the dtype and memory format of x.

    Shape:
        x: (N, C, *); tables: (N, C), or (1, C) for all instances, or (K, C) with index (N,), the
        row of each instance, or (1,), that of all.
    """
    if not uses_kernels(x):
        return _by_formula(index, x, *table)
    dtype = compute_dtype(x)
    tables = tuple([as_dtype(t, dtype) for t in table])
    if not records((x, *tables)):
        return _apply(x, index, *tables)
    y: Tensor = _TableAffine.apply(x, index, *tables)
    return y


def apply_by_label(
    x: Tensor,
    table: Callable[[], Centred],
    labels: Tensor | None,
    unlabelled: bool,
    unknown: Callable[[], Centred],
) -> Tensor:
    """Apply the map of each sample's label; `unknown` is that of those without one, or of all."""
    if labels is None:
        return apply_centred(x, unknown())
    maps = table()
    if not unlabelled:
        return apply_centred(x, maps, one_label(labels) if maps.scale.shape[0] > 1 else None)
    return apply_centred(x, maps.rows(labels.clamp(min=0)).where(labels >= 0, unknown()))


def _picked(tables: Sequence[Tensor], index: Tensor | None) -> Sequence[Tensor]:
    return tables if index is None else [pick_rows(t, index) for t in tables]


def _apply(x: Tensor, index: Tensor | None, *tables: Tensor) -> Tensor:
    centre, scale, shift = tables
    if (triton := triton_for(x)) is not None:
        y: Tensor = triton.affine(x, scale, shift, centre, index)
        return y
    offset = torch.addcmul(shift, centre, scale, value=-1)
    scale, offset = _picked((scale, offset), index)
    return kernels.affine(x, scale, offset)


def apply_affine(x: Tensor, affine: Affine) -> Tensor:
    """Return ``x * scale + shift`` in the dtype and memory format of x.

    Shape:
        x: (N, C, *); scale, shift: (N, C), or (1, C) for all instances.
    """
    return apply_centred(x, affine.centred())


class _TableAffine(Function):
    """``y = (x - c) * s + t``: dx = dy s, ds = sum dy (x - c), dt = sum dy, dc = -s dt."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, index, *tables = inputs
        kept = x if any(ctx.needs_input_grad[1:]) else None
        ctx.save_for_backward(kept, index, *tables[:2])
        return _apply(x, index, *tables)

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, index, *tables = ctx.saved_tensors
        needed, (dy,) = ctx.needs_input_grad, grads
        if needs_formula(dy):
            if x is None:  # no gradient depends on what was not kept
                like = {"dtype": dy.dtype, "device": dy.device, "requires_grad": True}
                x = torch.zeros(dy.shape, **like)
            shift = torch.zeros_like(tables[1], requires_grad=True)
            formula = partial(_by_formula, index)
            found = differentiate_again(formula, (x, *tables, shift), dy, (needed[0], *needed[2:]))
            return found[0], None, *found[1:]
        centre, scale = _picked(tables, index)
        if x is None:
            dy = dy if kernels.suits(dy) else dy.contiguous()
            return kernels.affine(dy, scale, None), *[None] * 4
        dy, dx = kernels.match(dy, x), None
        if needed[0]:
            dx, dshift, dscale = kernels.scale_and_dot(dy, x, centre, scale)
        else:
            dshift, dscale = kernels.dot(dy, x, centre)
        if index is not None:
            dshift, dscale = (segment_sum(t, index, len(tables[0])) for t in (dshift, dscale))
        return dx, None, -tables[1] * dshift if needed[2] else None, dscale, dshift


def _by_formula(index: Tensor | None, x: Tensor, *tables: Tensor) -> Tensor:
    return apply_centred_by_formula(x, Centred(*_picked(tables, index)))
