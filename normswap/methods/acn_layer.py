"""The layer of ACN: a learned Gaussian mixture for each channel, no labels."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.distributed import sum_over
from normswap.functional.backward import in_backward
from normswap.functional.mixture import MASS, Mixture, Normalized, norm_positions
from normswap.functional.mixture_fused import norm_elements
from normswap.functional.mixture_instances import norm_instances
from normswap.functional.mixture_start import (
    bounded_log_prior,
    bounded_log_sigma,
    start_components,
)
from normswap.functional.mixture_synced import shared_moments
from normswap.functional.moments import Moments, compute_dtype, log_spread
from normswap.methods.acn_options import AdaptiveOptions
from normswap.methods.layer import NormLayer
from normswap.methods.values import check_settings, counted_nothing, fitting

_NORMALIZE: dict[str, Callable[..., Normalized]] = {
    "channel": norm_elements,
    "position": norm_positions,
    "instance": norm_instances,
}
_TRACKED = ("running_mean", "running_var", "num_batches_tracked")


class AdaptiveContextNorm(NormLayer):
    """Adaptive context normalization (ACN).

    ``y = gamma * sum_k tau_k / sqrt(lambda_k) * (x - m_k) / sqrt(v_k + eps) + beta`` with
    ``log tau_k = log_softmax_k(log lambda_k - log sigma_k - (x - mu_k)^2 / (2 sigma_k^2))``;
    lambda, mu and sigma are learned. With ``statistics="batch"``, m_k and v_k (biased) are the
    tau-weighted moments of the batch, the weights of a component summing to one; running averages
    of them, with BatchNorm's momentum and the factor n / (n - 1) for the n values of a channel, are
    used in eval, for a batch with a single value per channel, and for a component that owns less
    than a thousandth of a value (which updates nothing). With "learned", m_k is mu_k and
    sqrt(v_k + eps) is sigma_k, in both modes.

    With `synced` set, m_k and v_k are over the batches of all processes, or of those in the group
    that `process_group` names; see `ContextNorm`, which has the same.

    One component is BatchNorm. lambda_k is at least 0.01 / K and sigma_k at least sqrt(eps).

    Args:
        num_features: C.
        components: K, and the further settings of `AdaptiveOptions`: statistics, assignment,
            start, strength.
        eps: added to the variance of the batch; its root is the least sigma.
        momentum: weight of the new value in the running statistics, in [0, 1]; None keeps the
            cumulative average.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x: (N, C, *). Parameters weight, bias: (C,); mu, log_sigma: (K, C); prior_logits: (K, C),
        or (K, 1) with ``assignment="position"``. Buffers with ``statistics="batch"``:
        running_mean, running_var: (K, C), num_batches_tracked: ().

    Source: Faye et al., arXiv 2403.16798, ACN; "position": Kalayeh and Shah, "Training Faster by
    Separating Modes of Variation in Batch-normalized Models", TPAMI 2020 (Mixture Normalization).
    Differs from source: responsibilities in log space, without an eps that zeroes tails; weights
    of a component sum to one over the batch, so that one component is BatchNorm; the updates of
    the statistics are kept; the layer keeps gamma and beta; lambda and sigma are bounded.
    """

    context_parameters = ("prior_logits", "mu", "log_sigma")
    weight: nn.Parameter
    bias: nn.Parameter
    prior_logits: nn.Parameter
    mu: nn.Parameter
    log_sigma: nn.Parameter
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        components: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        statistics: str = "batch",
        assignment: str = "channel",
        start: str = "skewed",
        strength: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features)
        self.options = AdaptiveOptions(components, statistics, assignment, start, strength)
        check_settings(eps, momentum)
        self.eps = eps
        self.momentum = momentum
        self.frozen = False
        self.synced = False
        self.process_group: str | None = None
        shape = (components, num_features)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, **placed)))
        logits = (components, 1) if assignment == "position" else shape
        self.prior_logits = nn.Parameter(torch.empty(logits, **placed))
        self.mu = nn.Parameter(torch.empty(shape, **placed))
        self.log_sigma = nn.Parameter(torch.empty(shape, **placed))
        self.track_running_stats = tracked = statistics == "batch"
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(shape, **placed) if tracked else None)
        self.register_buffer(
            "num_batches_tracked",
            torch.zeros((), dtype=torch.int64, device=device) if tracked else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute what a fresh BatchNorm computes in eval mode."""
        ones = torch.ones_like(self.weight)
        self.set_values(self.start_from(0 * ones, ones, ones, 0 * ones))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    @torch.no_grad()
    def start_from(
        self, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
    ) -> dict[str, Tensor]:
        """Return the values with which the layer computes a batch norm's function in eval mode.

        Args:
            mean: running mean of the batch norm, (C,).
            var: its running variance.
            weight: its gamma.
            bias: its beta.
        """
        chosen = self.options
        assert chosen.strength is not None
        logits, offsets, factor = start_components(
            chosen.components, chosen.start, chosen.strength, self.prior_logits.dtype
        )
        log_sigma = log_spread(var, self.eps).expand_as(self.mu)
        mu = mean.double() + offsets.to(mean.device).unsqueeze(1) * log_sigma.exp()
        values = {
            "weight": factor * weight.double(),
            "bias": bias,
            "prior_logits": logits.to(mean.device).unsqueeze(1).expand_as(self.prior_logits),
            "mu": mu,
            "log_sigma": log_sigma,
        }
        if self.running_mean is not None:
            values |= {"running_mean": mu, "running_var": var.expand_as(self.mu)}
        return values

    @torch.no_grad()
    def set_values(self, values: dict[str, Tensor]) -> None:
        """Copy values into the parameters and buffers of these names."""
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def mixture(self, dtype: torch.dtype | None = None) -> Mixture:
        """Return lambda, mu and sigma within their bounds."""
        logits, mu, log_sigma = (
            t.to(dtype or t.dtype) for t in (self.prior_logits, self.mu, self.log_sigma)
        )
        return Mixture(bounded_log_prior(logits), mu, bounded_log_sigma(log_sigma, self.eps))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x.

        Args:
            x: input, (N, C, *).

        Returns:
            A tensor of the shape, dtype and memory format of x.

        Raises:
            ContextError: another number of channels or of dimensions.
        """
        if isinstance(x, fx.Proxy):
            return self._record(x)
        self._check_input(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._finish(self.normalize(x))
        return self._finish(self.normalize(x))

    def normalize(self, x: Tensor) -> Tensor:
        """Compute the layer; see the class."""
        values = x.numel() // max(x.shape[1], 1)
        tracked = self.running_mean is not None
        frozen = self.frozen or self.stats_frozen
        batch = tracked and self.training and not frozen
        if batch and self.synced and (reduce := sum_over(self.process_group)) is not None:
            return self._normalize_shared(x, reduce)
        batch = batch and values > 1
        result = self.compute(x, batch)
        if batch and not in_backward():
            self._update(result, values / (values - 1))
        return result.y

    def _normalize_shared(self, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Normalise with what the components own of the batches of all processes."""
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = compute_dtype(x)
        mixture = self.mixture(dtype)
        given = Moments(*(t.to(dtype).clone() for t in (self.running_mean, self.running_var)))
        mass, moments, values = shared_moments(x, mixture, given, self.options.assignment, reduce)
        gain = self.weight.to(dtype) * (-0.5 * mixture.log_prior).exp()
        run = _NORMALIZE[self.options.assignment]
        y = run(x, mixture, gain, self.bias.to(dtype), moments, self.eps, False).y
        if not in_backward():
            factor = values / (values - 1).clamp(min=1)
            self._update(Normalized(y, mass, moments), factor, values > 1)
        return y

    def compute(self, x: Tensor, batch: bool) -> Normalized:
        """Normalise with the moments of this batch, or with the tracked or learned ones."""
        dtype = compute_dtype(x)
        mixture, eps = self.mixture(dtype), self.eps
        gain = self.weight.to(dtype) * (-0.5 * mixture.log_prior).exp()
        if self.running_mean is None or self.running_var is None:
            given, eps = Moments(mixture.mean, (2 * mixture.log_sigma).exp()), 0.0
        else:
            # Clones: the update is in place, and backward needs the values of this forward.
            given = Moments(*(t.to(dtype).clone() for t in (self.running_mean, self.running_var)))
        run = _NORMALIZE[self.options.assignment]
        return run(x, mixture, gain, self.bias.to(dtype), given, eps, batch)

    @torch.no_grad()
    def _update(
        self, result: Normalized, factor: float | Tensor, counts: bool | Tensor = True
    ) -> None:
        """Move the running statistics of the components that own something of the batch."""
        count, mean, var = self.num_batches_tracked, self.running_mean, self.running_var
        assert count is not None
        assert mean is not None
        assert var is not None
        count.add_(counts)
        rate: Any = self.momentum
        if rate is None:
            rate = count.clamp(min=1).to(result.mass.dtype).reciprocal()
        rate = (result.mass >= MASS).to(result.mass.dtype) * rate
        unbiased = result.moments.var * factor
        for buffer, new in ((mean, result.moments.mean), (var, unbiased)):
            buffer.copy_(buffer + rate * (new - buffer))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a BatchNorm's entries too: the layer then computes its function."""
        mean, var = (state_dict.get(prefix + name) for name in _TRACKED[:2])
        shape = (self.num_features,)
        if isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.shape == shape:
            ones = torch.ones_like(mean)
            weight = state_dict.get(prefix + "weight", ones)
            bias = state_dict.get(prefix + "bias", torch.zeros_like(mean))
            place = mean.device if self.mu.is_meta else self.mu.device
            tensors = (t.to(place) for t in (mean, var, weight, bias))
            if self.running_mean is None:
                for name in _TRACKED:
                    state_dict.pop(prefix + name, None)
            else:
                assert self.num_batches_tracked is not None
                count = counted_nothing(self.num_batches_tracked)
                state_dict.setdefault(prefix + _TRACKED[2], count)
            metadata = args[0] if args else None
            for name, value in self.start_from(*tensors).items():
                state_dict[prefix + name] = fitting(value, mean, metadata).clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        default = asdict(AdaptiveOptions(self.options.components))
        settings = asdict(self.options)
        changed = [f"{k}={v!r}" for k, v in settings.items() if v != default[k]]
        first = f"{self.num_features}, components={self.options.components}"
        return ", ".join([first, *changed])
