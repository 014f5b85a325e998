"""Affine maps of x by tables, and by a small function of x's own statistics: the fused layers.

Both are autograd Functions around the kernels: one sweep a pass, x the only tensor of its size that
is saved. The plain formulas serve where the kernels cannot: under torch.compile, export and
tracing (where a compiler fuses them), functorch and forward-mode derivatives, second derivatives,
devices, dtypes and strides that the kernels do not know.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from normswap.functional import kernels
from normswap.functional.affine import Affine, Centred
from normswap.functional.moments import Moments, compute_dtype, instance_moments


class Glue(Protocol):
    """From the statistics of the instances, and parameters, to a map of each instance."""

    def __call__(self, instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
        """Return s and t, both (N, C), of ``y = (x - mean) * s + t``.

        Pure in what it returns. It may update buffers, unless it is replayed for a derivative.
        """


def uses_kernels(x: Tensor) -> bool:
    """Return whether x can go through the kernels here and now."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(x) not in (Tensor, nn.Parameter) or not kernels.suits(x):
        return False
    transformed: bool = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0


def _records(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _sums(t: Tensor, rows: int) -> Tensor:
    """Return the sum over positions, and over instances where the tables have one row."""
    dims = tuple(range(2, t.dim()))
    total = t.sum(dims) if dims else t
    return total.sum(0, keepdim=True) if rows == 1 else total


def apply_centred_plain(x: Tensor, table: Centred) -> Tensor:
    """Compute `apply_centred` with torch's own derivatives."""
    shape = table.scale.shape + (1,) * (x.dim() - 2)
    dtype = compute_dtype(x)
    centre, scale, shift = (t.to(dtype).reshape(shape) for t in table)
    return torch.addcmul(shift - centre * scale, x.to(dtype), scale).to(x.dtype)


def apply_centred(x: Tensor, table: Centred) -> Tensor:
    """Return ``(x - centre) * scale + shift`` in the dtype and memory format of x.

    Shape:
        x: (N, C, *); tables: (N, C), or (1, C) for all instances.
    """
    if not uses_kernels(x):
        return apply_centred_plain(x, table)
    dtype = compute_dtype(x)
    tables = tuple(t.to(dtype) for t in table)
    if not _records((x, *tables)):
        return kernels.affine(x, *tables)
    y: Tensor = _TableAffine.apply(x, *tables)
    return y


def apply_affine(x: Tensor, affine: Affine) -> Tensor:
    """Return ``x * scale + shift`` in the dtype and memory format of x.

    Shape:
        x: (N, C, *); scale, shift: (N, C), or (1, C) for all instances.
    """
    return apply_centred(x, affine.centred())


class _TableAffine(Function):
    """``y = (x - c) * s + t``: dx = dy s, ds = sum dy (x - c), dt = sum dy, dc = -s dt."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, centre, scale, shift = inputs
        kept = x if any(ctx.needs_input_grad[1:]) else None
        ctx.save_for_backward(kept, centre, scale)
        return kernels.affine(x, centre, scale, shift)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, centre, scale = ctx.saved_tensors
        needed, (dy,) = ctx.needs_input_grad, grads
        if torch.is_grad_enabled():
            return _differentiate_tables(dy, x, centre, scale)
        if x is None:
            return kernels.scaled(dy if kernels.suits(dy) else dy.contiguous(), scale), *[None] * 3
        dy, dx = kernels.match(dy, x), None
        if needed[0]:
            dx, dshift, dscale = kernels.scale_and_dot(dy, x, centre, scale)
        else:
            dshift, dscale = kernels.dot(dy, x, centre)
        return dx, -scale * dshift if needed[1] else None, dscale, dshift


def _differentiate_tables(
    dy: Tensor, x: Tensor | None, centre: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients with a graph of their own."""
    rows, shape = len(scale), scale.shape + (1,) * (dy.dim() - 2)
    wide = dy.to(scale.dtype)
    dx = (wide * scale.reshape(shape)).to(dy.dtype)
    if x is None:
        return dx, None, None, None
    dshift = _sums(wide, rows)
    dscale = _sums(wide * (x.to(scale.dtype) - centre.reshape(shape)), rows)
    return dx, -scale * dshift, dscale, dshift


def stat_affine(x: Tensor, glue: Glue, *tensors: Tensor) -> Tensor:
    """Return ``(x - mean) * s + t`` with s and t a function of x's own statistics.

    Args:
        x: (N, C, *).
        glue: from mean and biased variance of each channel of each instance, (N, C), and
            `tensors` to s and t. Anything differentiable; what costs, is of the size of x, is not
            its business.
        tensors: what the glue differentiates besides the statistics: parameters.

    Returns:
        A tensor of the shape, dtype and memory format of x.
    """
    if not uses_kernels(x):
        return _compute_plain(x, glue, tensors, replay=False)
    if not _records((x, *tensors)):
        instances = kernels.stats(x)
        scale, shift = glue(instances, *tensors, replay=False)
        return kernels.affine(x, instances.mean, scale, shift)
    y: Tensor = _StatAffine.apply(x, glue, *tensors)
    return y


def _compute_plain(x: Tensor, glue: Glue, tensors: Sequence[Tensor], replay: bool) -> Tensor:
    instances = instance_moments(x)
    affine = glue(instances, *tensors, replay=replay)
    return apply_centred_plain(x, Centred(instances.mean, *affine))


class _StatAffine(Function):
    """The glue's derivative is torch's, on its (N, C); that of the rest, over x, is by hand.

    With D1 = sum dy, D2 = sum dy (x - m) and dm, dv what the glue makes of (D2, D1):
    dx = s dy + 2 dv / M (x - m) + (dm - s D1) / M.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, glue, *tensors = inputs
        instances = kernels.stats(x)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad)
        needed = needed[:2] + needed[3:]
        with torch.enable_grad():
            given = zip((*instances, *tensors), needed, strict=True)
            leaves = [t.detach().requires_grad_(need) for t, need in given]
            affine = glue(Moments(*leaves[:2]), *leaves[2:], replay=False)
        ctx.glue, ctx.leaves, ctx.affine = glue, leaves, affine
        ctx.save_for_backward(x, *tensors)
        return kernels.affine(x, instances.mean, *(t.detach() for t in affine))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():
            found = _differentiate(x, ctx.glue, tensors, grads[0], needed)
            return found[0], None, *found[1:]
        dy, mean, scale = kernels.match(grads[0], x), ctx.leaves[0].detach(), ctx.affine.scale
        first, second = kernels.dot(dy, x, mean)
        pairs = zip(ctx.affine, (second, first), strict=True)
        pulled = [(out, grad) for out, grad in pairs if out.requires_grad]
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        results: list[Tensor | None] = [None] * len(wanted)
        if pulled:
            outs, cotangents = zip(*pulled, strict=True)
            results = list(
                torch.autograd.grad(outs, wanted, cotangents, retain_graph=True, allow_unused=True)
            )
        iterator = iter(results)
        dmean, dvar, *dtensors = (
            next(iterator) if leaf.requires_grad else None for leaf in ctx.leaves
        )
        if not needed[0]:
            return None, None, *dtensors
        a, share = scale.detach(), 1 / x.shape[2:].numel()
        # Differences first: a map that does not depend on the mean has a c of exactly zero.
        c = torch.addcmul(torch.zeros_like(a) if dmean is None else dmean, a, first, value=-1)
        c = c.mul_(share)
        b = torch.zeros_like(a) if dvar is None else dvar * (2 * share)
        return kernels.combine(dy, x, a, b, c.addcmul_(b, mean, value=-1)), None, *dtensors


def _differentiate(
    x: Tensor, glue: Glue, tensors: Sequence[Tensor], dy: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients with a graph of their own, for second derivatives."""
    with torch.autocast(x.device.type, enabled=False):
        y = _compute_plain(x, glue, tensors, replay=True)
    wanted = [t for t, need in zip((x, *tensors), needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
