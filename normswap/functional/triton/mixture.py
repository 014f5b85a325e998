"""ACN by Triton: a mixture that assigns each value on its own, in three passes and two, with glue.

Formulas as in `normswap.functional.mixture_fused`. The parameters are read as they are stored:
bounds and softmax are a part of the kernels, so that a layer starts nothing else.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import kernels
from normswap.functional.mixture import Mixture, norm_elements_by_formula
from normswap.functional.mixture_start import (
    PRIOR_FLOOR,
    bounded_log_prior,
    bounded_log_sigma,
    log_sigma_bounds,
)
from normswap.functional.moments import Moments
from normswap.functional.tables import records
from normswap.functional.triton.mixture_kernels import (
    differentiate,
    finish,
    masses,
    mix,
    pulls,
    settle,
)
from normswap.functional.triton.plan import launch, power

# Components beyond them are torch's: tiles would be narrower than a warp.
_MOST_COMPONENTS = 64
# Warps of a program, and eight values of all components for each thread.
_WARPS, _VALUES = 8, 2048
# Two for each of 132 multiprocessors: few enough that each can add up what the others left.
_PROGRAMS = 264


class Settings(NamedTuple):
    """How a layer is to compute.

    Attributes:
        eps: added to variances of the batch and running ones; its root is the least sigma.
        batch: whether the moments are the batch's.
        update: whether they move the running ones.
        momentum: by which weight, None for cumulative averages.
    """

    eps: float
    batch: bool
    update: bool
    momentum: float | None


class Cut(NamedTuple):
    """Tiles (BM, BC) of x (N, C, *), and the programs that share them.

    Attributes:
        geometry: C, M, sn, sm, sc, T, TILES, P of the kernels.
        blocks: FLOOR, K, KP, BM, BC.
        glue: the same for kernels over tables alone.
        programs: of a launch over x, and over tables.
    """

    geometry: tuple[int, ...]
    blocks: dict[str, Any]
    glue: dict[str, Any]
    programs: tuple[int, int]


def serves(assignment: str, components: int) -> bool:
    """Return whether the kernels know such a layer; see `AdaptiveOptions`."""
    return assignment == "channel" and components <= _MOST_COMPONENTS


@lru_cache(maxsize=4096)
def _cut(shape: torch.Size, contiguous: bool, count: int) -> Cut:
    instances, channels, positions = shape[0], shape[1], shape[2:].numel()
    components = power(count)
    values = max(_VALUES // components, 1)
    if contiguous:
        rows = min(values, power(positions))
        columns = min(values // rows, power(channels))
        strides = (channels * positions, 1, positions)
    else:
        # One instance of all positions: the tables are the same for all.
        instances, positions = 1, instances * positions
        columns = min(16, values, power(channels))
        rows = min(values // columns, power(positions))
        strides = (0, channels, 1)
    width, tiles = -(-channels // columns), -(-positions // rows)
    programs = max(1, min(instances * tiles, _PROGRAMS // width))
    same = {"K": count, "KP": components}
    narrow = min(8, power(channels))
    glue = {**same, "BM": max(1024 // components // narrow, 1), "BC": narrow}
    return Cut(
        (channels, positions, *strides, tiles, instances * tiles, programs),
        {"FLOOR": PRIOR_FLOOR, **same, "BM": rows, "BC": columns, "num_warps": _WARPS},
        glue,
        (programs * width, -(-channels // narrow)),
    )


def norm_elements(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    running: tuple[Tensor, Tensor, Tensor] | None,
    settings: Settings,
) -> Tensor:
    """Return x normalised, in its dtype and layout; see `AdaptiveContextNorm`.

    Args:
        x: (N, C, *).
        parameters: weight and bias (C,), logits of lambda, mu and log sigma (K, C).
        running: mean, variance (K, C) and number of batches, changed in place; None where mu and
            sigma serve.
        settings: see there.
    """
    if not records((x, *parameters)):
        return _forward(x, parameters, running, settings)[0]
    y: Tensor = _Elements.apply(x, *parameters, running, settings)
    return y


def _forward(
    x: Tensor, parameters: tuple[Tensor, ...], running: Any, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return y, and the mass, mean and variance that components are normalised with, (3, K, C)."""
    weight, bias, *assigned = parameters
    mu, log_sigma = assigned[1:]
    cut = _cut(x.shape, x.is_contiguous(), len(mu))
    channels, programs = x.shape[1], cut.geometry[-1] if settings.batch else 0
    bounds = log_sigma_bounds(settings.eps)
    number = x.numel() // channels
    y, used = torch.empty_like(x), x.new_empty(3, *mu.shape, dtype=torch.float32)
    part = used.new_empty(programs, 4, *mu.shape)
    mean, var, count = running or (None, None, None)
    if settings.batch:
        launch(
            masses,
            cut.programs[0],
            x,
            part,
            *assigned,
            *bounds,
            *cut.geometry,
            **cut.blocks,
        )
    factor = number / max(number - 1, 1)
    launch(
        settle, cut.programs[1], part, used, mu, log_sigma, *bounds, mean, var, count,
        settings.momentum, factor, channels, programs, UPDATE=settings.update, **cut.glue,
    )  # fmt: skip
    launch(
        mix, cut.programs[0], x, y, used, count, weight, bias, *assigned, *bounds,
        settings.eps if running else 0.0, *cut.geometry, UPDATE=settings.update, **cut.blocks,
    )  # fmt: skip
    return y, used


class _Elements(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, *parameters, running, ctx.settings = inputs
        y, used = _forward(x, tuple(parameters), running, ctx.settings)
        ctx.learned = running is None
        ctx.save_for_backward(x, *parameters, used)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *inputs, used = ctx.saved_tensors
        needed = ctx.needs_input_grad[: len(inputs)]
        with torch.autocast(grads[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                found = _differentiate(grads[0], inputs, used, ctx.settings, ctx.learned, needed)
            else:
                found = _backward(grads[0], inputs, used, ctx.settings, ctx.learned)
        pairs = zip(found, needed, strict=True)
        return *(grad if wanted else None for grad, wanted in pairs), None, None


def _backward(
    dy: Tensor, inputs: list[Tensor], used: Tensor, settings: Settings, learned: bool
) -> list[Tensor | None]:
    x, weight, _, *assigned = inputs
    cut, dy = _cut(x.shape, x.is_contiguous(), used.shape[1]), kernels.match(dy, x)
    bounds, eps = log_sigma_bounds(settings.eps), 0.0 if learned else settings.eps
    programs, dx = cut.geometry[-1], torch.empty_like(x)
    pulled = used.new_empty(programs, 2, *used.shape[1:])
    part = used.new_empty(programs, *used.shape)
    found = [torch.empty_like(t) for t in inputs[1:]]
    launch(
        pulls, cut.programs[0], x, dy, pulled, used, *assigned, *bounds,
        *cut.geometry, **cut.blocks,
    )  # fmt: skip
    launch(
        differentiate, cut.programs[0], x, dy, dx, pulled, part, used, weight, *assigned,
        *bounds, eps, *cut.geometry, **cut.blocks,
    )  # fmt: skip
    launch(
        finish, cut.programs[1], pulled, part, used, weight, assigned[0], assigned[2],
        *bounds, eps, *found, x.shape[1], programs, LEARNED=learned, FLOOR=PRIOR_FLOOR, **cut.glue,
    )  # fmt: skip
    return [dx, *found]


def _differentiate(
    dy: Tensor,
    inputs: list[Tensor],
    used: Tensor,
    settings: Settings,
    learned: bool,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients with a graph of their own, for second derivatives."""
    # As views: of inputs that depend on each other, each is to be held fixed for the others.
    views = [t.view_as(t) for t in inputs]
    x, (weight, bias, logits, mu, log_sigma) = views[0], (t.float() for t in views[1:])
    log_prior, log_sigma = bounded_log_prior(logits), bounded_log_sigma(log_sigma, settings.eps)
    given = Moments(mu, (2 * log_sigma).exp()) if learned else Moments(used[1], used[2])
    y = norm_elements_by_formula(
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
