"""ACN by Triton's kernels: autograd around those of `elements` and of `owners`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional.mixture import Mixture, Normalized, norm_elements_by_formula
from normswap.functional.mixture_instances import norm_instances
from normswap.functional.mixture_start import bounded_log_prior, bounded_log_sigma
from normswap.functional.moments import Moments
from normswap.functional.tables import records
from normswap.functional.triton import elements, owners
from normswap.functional.triton.elements import Running
from normswap.functional.triton.elements import Settings as Settings

# Components beyond them are torch's: tiles would be narrower than a warp.
_MOST_COMPONENTS = 64
# Of all instances: their number in a launch fits into int32.
_MOST_POSITIONS = 2**30


class _Way(NamedTuple):
    """What computes an assignment.

    Attributes:
        forward: from x, parameters, running statistics and settings to y, and what backward needs:
            tensors, the first the mass, mean and variance that components are normalised with.
        backward: from dy, inputs, those tensors, settings and whether mu and sigma serve as
            moments, to the gradients of inputs.
        formula: the same in torch's operators.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., list[Tensor | None]]
    formula: Callable[..., Normalized]


_WAYS = {
    "channel": _Way(elements.forward, elements.backward, norm_elements_by_formula),
    "instance": _Way(owners.forward, owners.backward, norm_instances),
}


def serves(x: Tensor, assignment: str, components: int) -> bool:
    """Return whether the kernels know such a layer of x; see `AdaptiveOptions`."""
    fits = components <= _MOST_COMPONENTS and x.numel() // x.shape[1] < _MOST_POSITIONS
    return assignment in _WAYS and fits


def norm_mixture(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    running: Running,
    settings: Settings,
    assignment: str,
) -> Tensor:
    """Return x normalised, in its dtype and layout; see `AdaptiveContextNorm`.

    Args:
        x: (N, C, *).
        parameters: weight and bias (C,), logits of lambda, mu and log sigma (K, C).
        running: mean, variance (K, C) and number of batches, changed in place; None where mu and
            sigma serve.
        settings: see there.
        assignment: "channel" or "instance".
    """
    way = _WAYS[assignment]
    if not records((x, *parameters)):
        unrecorded: Tensor = way.forward(x, parameters, running, settings)[0]
        return unrecorded
    y: Tensor = _MixtureNorm.apply(x, *parameters, running, settings, way)
    return y


class _MixtureNorm(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, *parameters, running, ctx.settings, ctx.way = inputs
        y: Tensor
        y, *kept = ctx.way.forward(x, tuple(parameters), running, ctx.settings)
        ctx.learned = running is None
        ctx.save_for_backward(x, *parameters, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, kept, needed = list(saved[:6]), list(saved[6:]), ctx.needs_input_grad[:6]
        rest = (ctx.settings, ctx.learned)
        with torch.autocast(grads[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                formula = ctx.way.formula
                found = _differentiate(grads[0], inputs, kept[0], *rest, needed, formula)
            else:
                found = ctx.way.backward(grads[0], inputs, kept, *rest)
        pairs = zip(found, needed, strict=True)
        return *(grad if wanted else None for grad, wanted in pairs), None, None, None


def _differentiate(
    dy: Tensor,
    inputs: list[Tensor],
    used: Tensor,
    settings: Settings,
    learned: bool,
    needed: tuple[bool, ...],
    formula: Callable[..., Normalized],
) -> list[Tensor | None]:
    """Return the gradients with a graph of their own, for second derivatives."""
    # As views: of inputs that depend on each other, each is to be held fixed for the others.
    views = [t.view_as(t) for t in inputs]
    x, (weight, bias, logits, mu, log_sigma) = views[0], (t.float() for t in views[1:])
    log_prior, log_sigma = bounded_log_prior(logits), bounded_log_sigma(log_sigma, settings.eps)
    given = Moments(mu, (2 * log_sigma).exp()) if learned else Moments(used[1], used[2])
    y = formula(
        x,
        Mixture(log_prior, mu, log_sigma),
        weight * (-0.5 * log_prior).exp(),
        bias,
        given,
        0.0 if learned else settings.eps,
        settings.batch,
    ).y
    wanted = [t for t, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
