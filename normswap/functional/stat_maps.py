"""Affine maps of x by a small function of x's own statistics: one autograd Function for all.

x is the only tensor of its size that is saved. The formulas themselves serve where kernels cannot:
under torch.compile, export and tracing (where a compiler fuses them), functorch and forward-mode
derivatives, second derivatives, devices, dtypes and strides that the kernels do not know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import kernels
from normswap.functional.affine import Affine, Centred
from normswap.functional.backend import untraced
from normswap.functional.glue import GlueGradient, Map
from normswap.functional.moments import Moments, instance_moments
from normswap.functional.tables import (
    apply_centred_by_formula,
    differentiate_again,
    needs_formula,
    records,
    uses_kernels,
)


class Glue(Protocol):
    """From the statistics of the instances, and parameters, to a map of each instance."""

    def __call__(self, instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
        """Return s and t, both (N, C), of ``y = (x - mean) * s + t``.

        Pure in what it returns. It may update buffers, unless it is replayed for a derivative.
        """


class ExplicitGlue(Protocol):
    """The same function with its derivative written out; see `normswap.functional.glue`.

    An attribute `passes` names others over x than `normswap.functional.kernels`.
    """

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map and what `backward` needs."""

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Return the gradients, given ``sum dy * (x - centre)`` and ``sum dy``."""


def stat_affine(
    x: Tensor, glue: Glue, *tensors: Tensor, explicit: Callable[[], ExplicitGlue] | None = None
) -> Tensor:
    """Return ``(x - mean) * s + t`` with s and t a function of x's own statistics.

    Args:
        x: (N, C, *).
        glue: from mean and biased variance of each channel of each instance, (N, C), and
            `tensors` to s and t. Anything differentiable; what costs, is of the size of x, is not
            its business.
        tensors: what the glue differentiates besides the statistics: parameters.
        explicit: makes the same glue with a derivative of its own, where the kernels are used.

    Returns:
        A tensor of the shape, dtype and memory format of x.
    """
    if not uses_kernels(x):
        return _compute_by_formula(glue, False, x, *tensors)
    chosen = _AutogradGlue(glue, x.shape[2:].numel()) if explicit is None else explicit()
    if not records((x, *tensors)):
        passes = _passes(chosen)
        found, _ = chosen.forward(passes.stats(x), *(t.detach() for t in tensors))
        unrecorded: Tensor = passes.affine(x, found.scale, found.offset)
        return unrecorded
    y: Tensor = _StatAffine.apply(x, glue, chosen, *tensors)
    return y


def _passes(explicit: ExplicitGlue) -> Any:
    return getattr(explicit, "passes", kernels)


@dataclass(eq=False)
class _AutogradGlue:
    """Glue with torch's derivative."""

    glue: Glue
    positions: int

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Compute the glue, keeping its graph."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in (*instances, *tensors)]
            affine = self.glue(Moments(*leaves[:2]), *leaves[2:], replay=False)
        mean, scale, shift = (t.detach() for t in (leaves[0], *affine))
        offset = torch.addcmul(shift, mean, scale, value=-1)
        return Map(scale, offset, mean), (affine, leaves)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Go back through the graph; it is kept, as others' graphs are where torch is told to."""
        (scale, shift), leaves = saved
        pairs = ((scale, dscale), (shift, dshift))
        pulled = [(out, grad) for out, grad in pairs if out.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pulled and wanted:
            outs, grads = zip(*pulled, strict=True)
            found = torch.autograd.grad(outs, wanted, grads, True, allow_unused=True)
        iterator = iter(found)
        dmean, dvar, *dtensors = (next(iterator) if t.requires_grad else None for t in leaves)
        zero, share = torch.zeros_like(dscale), 1 / self.positions
        # Differences first: a map that does not depend on the mean has a constant of exactly zero.
        constant = torch.addcmul(zero if dmean is None else dmean, scale.detach(), dshift, value=-1)
        spread = zero if dvar is None else dvar * (2 * share)
        return GlueGradient(spread, constant.mul_(share), tuple(dtensors))


def _compute_by_formula(glue: Glue, replay: bool, x: Tensor, *tensors: Tensor) -> Tensor:
    instances = instance_moments(x)
    affine = glue(instances, *tensors, replay=replay)
    return apply_centred_by_formula(x, Centred(instances.mean, *affine))


class _StatAffine(Function):
    """dx = s dy + b (x - m) + c, with b and c what the glue makes of sum dy and sum dy (x - m)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, glue, explicit, *tensors = inputs
        found, ctx.kept = _run_glue(explicit, x, tensors, ctx.needs_input_grad[0])
        ctx.glue, ctx.explicit, ctx.scale, ctx.centre = glue, explicit, found.scale, found.centre
        # Under such hooks backward may be given another x: checkpointing computes it anew.
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.save_for_backward(x, *tensors)
        y: Tensor = _passes(explicit).affine(x, found.scale, found.offset)
        return y

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        if needs_formula(grads[0]):
            found = differentiate(x, ctx.glue, tensors, grads[0], needed)
            return found[0], None, None, *found[1:]
        kept, scale, centre = ctx.kept, ctx.scale, ctx.centre
        if ctx.hooked:
            pairs = zip(tensors, needed[1:], strict=True)
            tensors = [t.detach().requires_grad_(need) for t, need in pairs]
            (scale, _, centre), kept = _run_glue(ctx.explicit, x, tensors, needed[0])
        dy, dx = kernels.match(grads[0], x), None
        passes = _passes(ctx.explicit)
        dshift, dscale = passes.dot(dy, x, centre)
        found = ctx.explicit.backward(kept, dscale, dshift)
        if needed[0]:
            dx = passes.combine(dy, x, scale, found.spread, found.constant, centre)
        return dx, None, None, *found.tensors


def _run_glue(
    explicit: ExplicitGlue, x: Tensor, tensors: Sequence[Tensor], differentiable: bool
) -> tuple[Map, Any]:
    instances: Moments = _passes(explicit).stats(x)
    if differentiable:
        for t in instances:
            t.requires_grad_()
    return explicit.forward(instances, *tensors)


def differentiate(
    x: Tensor, glue: Glue, tensors: Sequence[Tensor], dy: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients by torch's own derivatives; see `differentiate_again`."""
    formula = partial(_compute_by_formula, glue, True)
    return differentiate_again(formula, (x, *tensors), dy, needed)
