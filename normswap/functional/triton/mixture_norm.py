"""ACN by Triton's kernels: those of `mixture_kernels`, where each value is assigned on its own.

Three launches forward, three backward; formulas as in `normswap.functional.mixture_fused`. The
parameters are read as they are stored: bounds and softmax are a part of the kernels, so that a
layer starts nothing else. `owners` assigns a channel of an instance as a whole.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional.kernels import match
from normswap.functional.mixture import Mixture, Normalized, norm_elements_by_formula
from normswap.functional.mixture_instances import norm_instances
from normswap.functional.mixture_start import (
    PRIOR_FLOOR,
    bounded_log_prior,
    bounded_log_sigma,
    log_sigma_bounds,
)
from normswap.functional.moments import Moments
from normswap.functional.triton import mixture_kernels as mk
from normswap.functional.triton import owners
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import pow2
from normswap.functional.triton.recording import Operator, Tensors, run

# Components beyond them are torch's: tiles would be narrower than a warp.
_MOST_COMPONENTS = 64
# Of all instances: their number in a launch fits into int32.
_MOST_POSITIONS = 2**30
# Warps of a program, and eight values of all components for each thread.
_WARPS, _VALUES = 8, 2048
# Two for each of 132 multiprocessors: few enough that each can add up what the others left.
_PROGRAMS = 264


class Settings(NamedTuple):
    """How a layer computes.

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


def serves(x: Tensor, assignment: str, components: int) -> bool:
    """Return whether the kernels know such a layer of x; see `AdaptiveOptions`."""
    fits = components <= _MOST_COMPONENTS and x.numel() // x.shape[1] < _MOST_POSITIONS
    return assignment in _OPERATORS and fits


def norm_mixture(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    running: tuple[Tensor, Tensor, Tensor] | None,
    settings: Settings,
    assignment: str,
) -> Tensor:
    """Return x normalised, in its dtype and layout; see `AdaptiveContextNorm`.

    Parameters are weight and bias (C,), logits of lambda, mu and log sigma (K, C); running are
    mean, variance (K, C) and number of batches, changed in place, or None where mu and sigma serve.
    """
    return run(_OPERATORS[assignment], (running, settings), x, *parameters)


class Cut(NamedTuple):
    """Tiles (BM, BC) of x (N, C, *), and the programs that share them.

    Attributes:
        geometry: C, M, sn, sm, sc, T, TILES, P of the kernels.
        blocks: their constants; `glue` those of kernels over tables alone.
        programs: of a launch over x, and over tables.
    """

    geometry: tuple[int, ...]
    blocks: dict[str, Any]
    glue: dict[str, Any]
    programs: tuple[int, int]


@lru_cache(maxsize=4096)
def _cut(shape: torch.Size, contiguous: bool, count: int) -> Cut:
    instances, channels, positions = shape[0], shape[1], shape[2:].numel()
    components = pow2(count)
    values = max(_VALUES // components, 1)
    if contiguous:
        rows = min(values, pow2(positions))
        columns = min(values // rows, pow2(channels))
        strides = (channels * positions, 1, positions)
    else:
        # One instance of all positions: the tables are the same for all.
        instances, positions = 1, instances * positions
        columns = min(16, values, pow2(channels))
        rows = min(values // columns, pow2(positions))
        strides = (0, channels, 1)
    width, tiles = -(-channels // columns), -(-positions // rows)
    programs = max(1, min(instances * tiles, _PROGRAMS // width))
    same = {"K": count, "KP": components}
    narrow = min(8, pow2(channels))
    glue = {**same, "BM": max(1024 // components // narrow, 1), "BC": narrow}
    return Cut(
        (channels, positions, *strides, tiles, instances * tiles, programs),
        {"FLOOR": PRIOR_FLOOR, **same, "BM": rows, "BC": columns, "num_warps": _WARPS},
        glue,
        (programs * width, -(-channels // narrow)),
    )


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    """Return y, and the mass, mean and variance that components are normalised with, (3, K, C)."""
    (x, weight, bias, *assigned), (running, settings) = inputs, given
    (_, mu, log_sigma), bounds = assigned, log_sigma_bounds(settings.eps)
    cut = _cut(x.shape, x.is_contiguous(), len(mu))
    channels, programs = x.shape[1], cut.geometry[-1] if settings.batch else 0
    y, used = torch.empty_like(x), x.new_empty(3, *mu.shape, dtype=torch.float32)
    part = used.new_empty(programs, 4, *mu.shape)
    mean, var, count = running or (None, None, None)
    if settings.batch:
        over_x = (x, part, *assigned, *bounds, cut.geometry)
        launch(mk.masses, cut.programs[0], *over_x, **cut.blocks)
    number = x.numel() // channels
    launch(
        mk.settle, cut.programs[1], part, used, mu, log_sigma, *bounds, mean, var, count,
        settings.momentum, number / max(number - 1, 1), channels, programs,
        UPDATE=settings.update, **cut.glue,
    )  # fmt: skip
    launch(
        mk.mix, cut.programs[0], x, y, used, count, weight, bias, *assigned, *bounds,
        settings.eps if running else 0.0, cut.geometry, UPDATE=settings.update, **cut.blocks,
    )  # fmt: skip
    return y, used


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    """Return the gradients of inputs, given what `forward` returned besides y."""
    (x, weight, _, *assigned), (used,), (running, settings) = inputs, kept, given
    cut, dy = _cut(x.shape, x.is_contiguous(), used.shape[1]), match(dy, x)
    bounds, eps = log_sigma_bounds(settings.eps), settings.eps if running else 0.0
    programs, dx = cut.geometry[-1], torch.empty_like(x)
    sums = used.new_empty(programs, 2, *used.shape[1:])
    part = used.new_empty(programs, *used.shape)
    found = [torch.empty_like(t) for t in inputs[1:]]
    over_x = (used, *assigned, *bounds, cut.geometry)
    launch(mk.gradient_sums, cut.programs[0], x, dy, sums, *over_x, **cut.blocks)
    launch(
        mk.differentiate, cut.programs[0], x, dy, dx, sums, part, used, weight, *assigned,
        *bounds, eps, cut.geometry, **cut.blocks,
    )  # fmt: skip
    launch(
        mk.finish, cut.programs[1], sums, part, used, weight, assigned[0], assigned[2],
        *bounds, eps, *found, x.shape[1], programs,
        LEARNED=running is None, FLOOR=PRIOR_FLOOR, **cut.glue,
    )  # fmt: skip
    return [dx, *found]


def _formula(
    formula: Callable[..., Normalized], inputs: Tensors, kept: Tensors, given: Any
) -> Tensor:
    (x, *tables), (running, settings) = inputs, given
    weight, bias, logits, mu, log_sigma = (t.float() for t in tables)
    log_prior, log_sigma = bounded_log_prior(logits), bounded_log_sigma(log_sigma, settings.eps)
    moments = Moments(*kept[0][1:])
    if running is None:
        moments, settings = Moments(mu, (2 * log_sigma).exp()), settings._replace(eps=0.0)
    mixture, gain = Mixture(log_prior, mu, log_sigma), weight * (-0.5 * log_prior).exp()
    return formula(x, mixture, gain, bias, moments, settings.eps, settings.batch).y


_OPERATORS = {
    "channel": Operator(_forward, _backward, partial(_formula, norm_elements_by_formula)),
    "instance": Operator(owners.forward, owners.backward, partial(_formula, norm_instances)),
}
