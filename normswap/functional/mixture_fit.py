"""Fit a Gaussian mixture to the channels of a sample, by expectation maximisation."""

import torch
from torch import Tensor

from normswap.functional.mixture import MASS, Mixture, responsibilities
from normswap.functional.moments import Moments

# A component's variance is at least this share of its channel's: likelihood grows without bound
# as a component closes in on a single value.
_LEAST_SHARE = 1e-3
_BLOCK = 2**22


def fit_mixture(
    sample: Tensor,
    count: int,
    eps: float,
    joint: bool = False,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Moments]:
    """Fit K components to each channel, or to all channels together.

    Starts as k-means++ does: each centre is a value drawn with probability proportional to its
    squared distance to the nearest centre so far.

    Args:
        sample: (R, C), finite.
        count: K.
        eps: least variance of a component, next to a thousandth of its channel's.
        joint: whether a row as a whole, not each of its values, belongs to a component.
        steps: passes over the sample.
        generator: draws the first centres; on the CPU.

    Returns:
        priors (K, C), or (K, 1) with `joint`; mean and variance, (K, C).
    """

    def fit(sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = sample.var(0, correction=0)
        least = (_LEAST_SHARE * total).clamp(min=eps)
        mean = _centres(sample, total.clamp(min=eps), count, joint, generator)
        var = total.clamp(min=eps).expand_as(mean)
        priors = torch.full_like(mean[:, :1] if joint else mean, 1 / count)
        for _ in range(steps):
            mixture = Mixture(priors.clamp(min=1e-6).log(), mean, 0.5 * var.log())
            tau = responsibilities(sample, mixture, joint)
            mass = tau.sum(1)
            share = mass.clamp(min=MASS)
            near = (tau * sample).sum(1) / share
            spread = (tau * (sample - near.unsqueeze(1)).square()).sum(1) / share
            priors = mass / sample.shape[0]
            mean = torch.where(mass >= MASS, near, mean)
            var = torch.where(mass >= MASS, spread, var).maximum(least)
        return priors, mean, var

    width = sample.shape[1] if joint else max(_BLOCK // (sample.shape[0] * count), 1)
    fits = map(fit, torch.split(sample, width, 1))
    priors, mean, var = (torch.cat(tables, 1) for tables in zip(*fits, strict=True))
    return priors, Moments(mean, var)


def _centres(
    sample: Tensor, scale: Tensor, count: int, joint: bool, generator: torch.Generator | None
) -> Tensor:
    """Draw the first means, (K, C)."""
    rows, channels = sample.shape
    draws = 1 if joint else channels
    pick = torch.randint(rows, (draws,), generator=generator, device="cpu").to(sample.device)
    nearest = torch.full((rows, draws), torch.inf, device=sample.device, dtype=sample.dtype)
    centres = []
    for _ in range(count):
        centre = sample.gather(0, pick.expand(1, channels))
        centres.append(centre)
        distance = (sample - centre).square() / scale
        nearest = nearest.minimum(distance.mean(1, keepdim=True) if joint else distance)
        # A channel without spread has no distances; any row will do.
        weights = nearest.T.clamp(min=torch.finfo(sample.dtype).tiny).cpu()
        pick = torch.multinomial(weights, 1, generator=generator).squeeze(1).to(sample.device)
    return torch.cat(centres)
