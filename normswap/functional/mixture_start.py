"""The bounds of a mixture's parameters, and the mixtures that compute a batch norm's function."""

import math

import torch
from torch import Tensor

# Every lambda is at least this over K: its square root divides.
PRIOR_FLOOR = 0.01
# Sigma is at least sqrt(eps), as the spread batch norm divides by; its square is finite in float32.
LOG_SIGMA_CEILING = 20.0
_SMALLEST_EPS = 1e-12


def bounded_log_prior(logits: Tensor) -> Tensor:
    """Return log lambda, (K, *): ``lambda = f / K + (1 - f) softmax_k(logits)``, f = 0.01."""
    share = PRIOR_FLOOR / logits.shape[0]
    return (share + (1 - PRIOR_FLOOR) * logits.softmax(0)).log()


def free_logits(priors: Tensor) -> Tensor:
    """Return logits (K, *) whose `bounded_log_prior` is the log of priors, or nearest to it."""
    share = PRIOR_FLOOR / priors.shape[0]
    return (priors - share).clamp(min=0.01 * share).log()


def bounded_log_sigma(log_sigma: Tensor, eps: float) -> Tensor:
    """Return log sigma clamped to `log_sigma_bounds`."""
    return log_sigma.clamp(*log_sigma_bounds(eps))


def log_sigma_bounds(eps: float) -> tuple[float, float]:
    """Return log sqrt(eps) and 20, the least and the greatest log sigma."""
    return 0.5 * math.log(max(eps, _SMALLEST_EPS)), LOG_SIGMA_CEILING


def start_components(
    count: int, start: str, strength: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Return components that together compute a batch norm's function.

    "skewed": lambda_k falls by exp(strength) from each to the next. Equal mu and sigma give
    ``tau_k = lambda_k``, hence ``gamma' = gamma / sum_k sqrt(lambda_k)``, exactly.

    "jitter": equal lambda, mu offset by delta_k sigma with mean zero and root mean square
    `strength`. To first order ``tau_k = (1 + z delta_k) / K`` at the normalised input z, hence
    ``gamma' = gamma / (sqrt(K) (1 - mean(delta^2)))``; what is left is of the fourth order,
    less than ``gamma strength^4 (|z| + |z|^3)``.

    Both at once would leave an error of the first order.

    Args:
        count: K.
        start: "skewed" or "jitter".
        strength: see above.
        dtype: what logits will be stored in; gamma' compensates for them as rounded.

    Returns:
        logits of lambda (K,), offsets delta (K,), both float64, and gamma' / gamma.
    """
    place = torch.arange(count, dtype=torch.float64, device="cpu")
    logits, offsets, shrink = -strength * place, torch.zeros_like(place), 1.0
    if start == "jitter":
        logits = torch.zeros_like(place)
        if count > 1:
            offsets = place - (count - 1) / 2
            offsets = strength * offsets / offsets.square().mean().sqrt()
            shrink = 1 - strength**2
    roots = (0.5 * bounded_log_prior(logits.to(dtype).double())).exp().sum()
    return logits, offsets, 1 / (float(roots) * shrink)
