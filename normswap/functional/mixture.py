"""Normalise with a Gaussian mixture: who owns a value, each component's moments, the sum.

Shared shapes: x (N, C, *), K components; component tables (K, C). The functions that normalise
compute ``y = sum_k tau_k * gain_k * (x - m_k) / sqrt(v_k + eps) + bias`` and differ in what is
assigned to components: each value, each position, or each channel of an instance.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.affine import fold_norm
from normswap.functional.backend import is_scripted
from normswap.functional.moments import Moments, compute_dtype

# A component that owns less than this many values of a batch has no moments there: it takes the
# given ones. In exact arithmetic any mass would do; in float32 it may underflow to zero.
MASS = 1e-3


class Mixture(NamedTuple):
    """K Gaussians for each channel.

    Attributes:
        log_prior: log lambda, (K, C), or (K, 1) where all channels share it; exp sums to one.
        mean: mu, (K, C).
        log_sigma: log of the standard deviation, (K, C).
    """

    log_prior: Tensor
    mean: Tensor
    log_sigma: Tensor


class Normalized(NamedTuple):
    """What a forward computed.

    Attributes:
        y: the output, in the dtype of x.
        mass: how many values of the batch each component owns, (K, C); zero unless `batch`.
        moments: the mean and biased variance each component was normalised with, (K, C).
    """

    y: Tensor
    mass: Tensor
    moments: Moments


def rows(table: Tensor, dims: int) -> Tensor:
    """Return a table (K, C) shaped to meet an input (N, C, *) of `dims` dimensions."""
    return table.reshape(table.shape[0], 1, table.shape[1], *[1] * (dims - 2))


def from_first(squares: Tensor) -> Tensor:
    """Return what components (dimension 0) have more than the first one.

    Far from all of them a square is so large that adding log lambda to it would lose lambda; where
    components have mean and sigma in common, as at the start, the difference is exactly zero.
    """
    return squares - squares[:1]


def responsibilities(x: Tensor, mixture: Mixture, joint: bool = False) -> Tensor:
    """Return the probability of each component given a value.

    ``log tau_k = log_softmax_k(log lambda_k - log sigma_k - (x - mu_k)^2 / (2 sigma_k^2))``;
    with `joint`, all channels of a position decide together: the last two terms are summed over
    channels.

    Args:
        x: (N, C, *).
        mixture: its log_prior is (K, 1) with `joint`.
        joint: whether positions, not values, are assigned.

    Returns:
        tau, (K, N, C, *), or (K, N, 1, *) with `joint`; sums to one over components.

    Source: Faye et al., arXiv 2403.16798, ACN.
    Differs from source: log space; an eps added to tau would zero it in the tails.
    """
    log_prior = rows(mixture.log_prior, x.dim())
    if not joint:
        log_sigma = rows(mixture.log_sigma, x.dim())
        z = (x - rows(mixture.mean, x.dim())) * (-log_sigma).exp()
        return (log_prior - log_sigma - 0.5 * from_first(z.square())).softmax(0)
    # sum_c (x - mu)^2 p, expanded so that nothing of size K * x is made.
    precision = (-2 * mixture.log_sigma).exp()
    weighted = mixture.mean * precision
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    distance = from_first((precision @ flat.square() - 2 * weighted @ flat).movedim(1, 0))
    constant = from_first(0.5 * (weighted * mixture.mean).sum(1) + mixture.log_sigma.sum(1))
    logits = mixture.log_prior.unsqueeze(1) - constant.view(-1, 1, 1) - 0.5 * distance
    return logits.softmax(0).view(len(logits), x.shape[0], 1, *x.shape[2:])


def norm_elements_by_formula(
    x: Tensor, mixture: Mixture, gain: Tensor, bias: Tensor, given: Moments, eps: float, batch: bool
) -> Normalized:
    """Normalise; every value is assigned on its own. Its memory grows with K; see `norm_elements`.

    Args:
        x: (N, C, *).
        mixture: in the dtype statistics accumulate in, as all tables.
        gain: (K, C), gamma / sqrt(lambda).
        bias: (C,).
        given: moments (K, C) used without `batch`, and for components that own nothing.
        eps: added to the variance.
        batch: whether to normalise with the tau-weighted moments of this batch.
    """
    # (N, C, M), or where a compiler reads channels last, (P, C); a table's row meets either.
    # Exported programs take inputs of other layouts than the example's.
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    last = compiled and x.dim() > 2 and x.stride(1) == 1 and x.shape[1] > 1
    values = x.to(compute_dtype(x))
    if last:
        values = values.movedim(1, -1).flatten(0, -2)
    else:
        values = values.flatten(2) if x.dim() > 2 else values.unsqueeze(2)
    dims, tail = ((0,), (-1,)) if last else ((0, 2), (-1, 1))

    def each(table: Tensor) -> list[Tensor]:
        return [row.reshape(tail) for row in table]

    # Components in turn, not stacked: a compiler then fuses them into one loop over x.
    tau = _shares(values, *map(each, mixture))
    used, mass = given, torch.zeros_like(given.mean)
    if batch:
        mass = torch.stack([t.sum(dims) for t in tau])
        share = mass.clamp(min=MASS)
        mean = torch.stack([(t * values).sum(dims) for t in tau]) / share
        pairs = zip(tau, each(mean), strict=True)
        var = torch.stack([(t * (values - m).square()).sum(dims) for t, m in pairs]) / share
        used = Moments(mean, var).where(mass >= MASS, given)
    y = bias.reshape(tail)
    scale = gain * torch.rsqrt(used.var + eps)
    for t, m, s in zip(tau, each(used.mean), each(scale), strict=True):
        y = y + t * (s * (values - m))
    if last:
        y = y.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1).to(x.dtype)
    else:
        y = _laid_out_as(x, y)
    return Normalized(y, mass, used)


def _shares(
    values: Tensor, log_prior: list[Tensor], mean: list[Tensor], log_sigma: list[Tensor]
) -> list[Tensor]:
    """Return `responsibilities`, one tensor a component, for tables that meet the values."""
    squares = [((values - m) * (-s).exp()).square() for m, s in zip(mean, log_sigma, strict=True)]
    # As in `from_first`.
    logits = [
        p - s - 0.5 * (square - squares[0])
        for p, s, square in zip(log_prior, log_sigma, squares, strict=True)
    ]
    top = functools.reduce(torch.maximum, logits).detach()
    odds = [(logit - top).exp() for logit in logits]
    total = functools.reduce(torch.add, odds)
    return [o / total for o in odds]


def norm_positions(
    x: Tensor, mixture: Mixture, gain: Tensor, bias: Tensor, given: Moments, eps: float, batch: bool
) -> Normalized:
    """Normalise; the channels of a position are assigned jointly. Arguments as for elements."""
    flat = x.to(compute_dtype(x))
    flat = flat.flatten(2) if x.dim() > 2 else flat.unsqueeze(2)
    # A shift of everything changes nothing but rounding: sums of squares need a near origin.
    origin = (flat.mean((0, 2)) if batch else given.mean.mean(0)).detach()
    flat = flat - origin.unsqueeze(1)
    mixture = mixture._replace(mean=mixture.mean - origin)
    given = Moments(given.mean - origin, given.var)
    tau = responsibilities(flat, mixture, joint=True).squeeze(2)
    used, mass = given, torch.zeros_like(given.mean)
    if batch:
        mass = tau.sum((1, 2)).unsqueeze(1)
        share = mass.clamp(min=MASS)
        mean = torch.einsum("knm,ncm->kc", tau, flat) / share
        square = torch.einsum("knm,ncm->kc", tau, flat.square()) / share
        batch_moments = Moments(mean, (square - mean.square()).clamp(min=0))
        used = batch_moments.where(mass >= MASS, given)
    affine = fold_norm(used, gain, bias, eps)
    scale, shift = (torch.einsum("knm,kc->ncm", tau, table) for table in affine)
    y = _laid_out_as(x, torch.addcmul(shift, flat, scale))
    return Normalized(y, mass, Moments(used.mean + origin, used.var))


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y in the shape, dtype and memory format of x."""
    y = y.reshape(x.shape).to(x.dtype)
    # The exporter of ONNX by tracing knows no copy.
    return y if x.is_contiguous() or is_scripted() else torch.empty_like(x).copy_(y)
