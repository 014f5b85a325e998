"""ACN by Triton's kernels: those of `elements` and of `owners`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from normswap.functional.mixture import Mixture, Normalized, norm_elements_by_formula
from normswap.functional.mixture_instances import norm_instances
from normswap.functional.mixture_start import bounded_log_prior, bounded_log_sigma
from normswap.functional.moments import Moments
from normswap.functional.triton import elements, owners
from normswap.functional.triton.elements import Running
from normswap.functional.triton.elements import Settings as Settings
from normswap.functional.triton.recording import Tensors, Way, run

# Components beyond them are torch's: tiles would be narrower than a warp.
_MOST_COMPONENTS = 64
# Of all instances: their number in a launch fits into int32.
_MOST_POSITIONS = 2**30


def _compute(
    formula: Callable[..., Normalized],
    inputs: Tensors,
    kept: Tensors,
    given: Any,
) -> Tensor:
    """Return y by a formula of `normswap.functional.mixture`."""
    (x, *tables), (running, settings) = inputs, given
    weight, bias, logits, mu, log_sigma = (t.float() for t in tables)
    log_prior, log_sigma = bounded_log_prior(logits), bounded_log_sigma(log_sigma, settings.eps)
    moments = Moments(*kept[0][1:])
    if running is None:
        moments, settings = Moments(mu, (2 * log_sigma).exp()), settings._replace(eps=0.0)
    mixture, gain = Mixture(log_prior, mu, log_sigma), weight * (-0.5 * log_prior).exp()
    return formula(x, mixture, gain, bias, moments, settings.eps, settings.batch).y


_WAYS = {
    "channel": Way(
        elements.forward, elements.backward, partial(_compute, norm_elements_by_formula)
    ),
    "instance": Way(owners.forward, owners.backward, partial(_compute, norm_instances)),
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
    return run(_WAYS[assignment], (running, settings), x, *parameters)
