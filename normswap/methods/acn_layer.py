"""The layer of ACN: a learned Gaussian mixture for each channel, no labels."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.functional.backend import triton_for
from normswap.functional.mixture import MASS, Mixture, Normalized, norm_positions
from normswap.functional.mixture_fused import norm_elements
from normswap.functional.mixture_instances import norm_instances
from normswap.functional.mixture_start import bounded_log_prior, bounded_log_sigma, start_components
from normswap.functional.mixture_synced import shared_moments
from normswap.functional.moments import Moments, compute_dtype, log_spread, widen
from normswap.methods.acn_options import AdaptiveOptions
from normswap.methods.layer import NormLayer
from normswap.methods.layer_tensors import check_settings, counted_nothing, fill_affine, fitting
from normswap.methods.running import RUNNING
from normswap.util.distributed import sum_over

_NORMALIZE: dict[str, Callable[..., Normalized]] = {
    "channel": norm_elements,
    "position": norm_positions,
    "instance": norm_instances,
}


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
    stats_frozen = False  # `normswap.freeze` sets it: use the running statistics, leave them
    weight: nn.Parameter
    bias: nn.Parameter
    prior_logits: nn.Parameter
    mu: nn.Parameter
    log_sigma: nn.Parameter

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
        self.eps, self.momentum = eps, momentum
        self.frozen = self.synced = False
        self.process_group: str | None = None
        shape = (components, num_features)
        logits = (components, 1) if assignment == "position" else shape
        shapes = {"weight": shape[1:], "bias": shape[1:], "prior_logits": logits}
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, size in (shapes | {"mu": shape, "log_sigma": shape}).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, **placed)))
        self.track_running_stats = statistics == "batch"
        self.add_running(shape, (), placed)
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

        The batch norm is told by its running statistics, gamma and beta, (C,) each.
        """
        chosen = self.options
        assert chosen.strength is not None
        logits, offsets, factor = start_components(
            chosen.components, chosen.start, chosen.strength, self.prior_logits.dtype
        )
        log_sigma = log_spread(var, self.eps).expand_as(self.mu)
        mu = widen(mean) + offsets.to(log_sigma).unsqueeze(1) * log_sigma.exp()
        logits = logits.to(log_sigma).unsqueeze(1).expand_as(self.prior_logits)
        values = {"weight": factor * widen(weight), "bias": bias, "prior_logits": logits}
        tracked = {"running_mean": mu, "running_var": var.expand_as(self.mu)}
        values |= {"mu": mu, "log_sigma": log_sigma}
        return values if self.running_mean is None else values | tracked

    @torch.no_grad()
    def set_values(self, values: dict[str, Tensor]) -> None:
        """Copy values into the parameters and buffers of these names."""
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def mixture(self, dtype: torch.dtype | None = None) -> Mixture:
        """Return lambda, mu and sigma within their bounds."""
        own = (self.prior_logits, self.mu, self.log_sigma)
        logits, mu, log_sigma = (t.to(dtype or t.dtype) for t in own)
        return Mixture(bounded_log_prior(logits), mu, bounded_log_sigma(log_sigma, self.eps))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the input, (N, C, *), to a tensor of the same shape, dtype and memory format.

        Raises:
            ContextError: another number of channels or of dimensions.
        """
        if isinstance(input, fx.Proxy):
            return self._record(input)
        x = self._accept(input)
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return self._finish(self.normalize(x))
        with torch.autocast(x.device.type, enabled=False):
            return self._finish(self.normalize(x))

    def normalize(self, x: Tensor) -> Tensor:
        """Compute the layer; see the class."""
        frozen = self.frozen or self.stats_frozen
        batch = self.running_mean is not None and self.training and not frozen
        if batch and self.synced and (reduce := sum_over(self.process_group)) is not None:
            # With what the components own of the batches of all processes.
            mixture, start, eps = self._moments(x)
            assignment = self.options.assignment
            mass, moments, values = shared_moments(x, mixture, start, assignment, reduce)
            y: Tensor = self._apply_mixture(x, mixture, moments, eps, False).y
            if not self.keeps_stats():
                result = Normalized(y, mass, moments)
                self._update(result, values / (values - 1).clamp(min=1), values > 1)
            return y
        number = x.numel() // max(x.shape[1], 1)
        batch = batch and number > 1
        parameters = (self.weight, self.bias, self.prior_logits, self.mu, self.log_sigma)
        running = tuple(getattr(self, name) for name in RUNNING)
        assignment = self.options.assignment
        triton = triton_for(x, "mixture_norm", *parameters, *running)
        if triton is not None and triton.serves(x, assignment, len(self.mu)):
            settings = triton.Settings(
                self.eps, batch, batch and not self.keeps_stats(), self.momentum
            )
            given = None if self.running_mean is None else running
            y = triton.norm_mixture(x, parameters, given, settings, assignment)
            return y
        result = self.compute(x, batch)
        if batch and not self.keeps_stats():
            self._update(result, number / (number - 1))
        return result.y

    def compute(self, x: Tensor, batch: bool) -> Normalized:
        """Normalise with the moments of this batch, or with the tracked or learned ones."""
        return self._apply_mixture(x, *self._moments(x), batch)

    def _moments(self, x: Tensor) -> tuple[Mixture, Moments, float]:
        """Return the mixture, the tracked or learned moments, and what is added to the variance."""
        dtype = compute_dtype(x)
        mixture, mean, var = self.mixture(dtype), self.running_mean, self.running_var
        if mean is None or var is None:
            return mixture, Moments(mixture.mean, (2 * mixture.log_sigma).exp()), 0.0
        # Clones: the update is in place, and backward needs the values of this forward.
        return mixture, Moments(mean.to(dtype).clone(), var.to(dtype).clone()), self.eps

    def _apply_mixture(
        self, x: Tensor, mixture: Mixture, given: Moments, eps: float, batch: bool
    ) -> Normalized:
        weight, bias = self.weight.to(mixture.mean.dtype), self.bias.to(mixture.mean.dtype)
        gain = weight * (-0.5 * mixture.log_prior).exp()
        return _NORMALIZE[self.options.assignment](x, mixture, gain, bias, given, eps, batch)

    @torch.no_grad()
    def _update(
        self, result: Normalized, factor: float | Tensor, counts: bool | Tensor = True
    ) -> None:
        """Move the running statistics of the components that own something of the batch."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(counts)
        (mean, var), dtype = result.moments, result.mass.dtype
        rate = (result.mass >= MASS).to(dtype) * self.running_rate(dtype)
        self.move_running(mean, var * factor, rate)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a BatchNorm's entries too: the layer then computes its function."""
        if fill_affine(self, state_dict, prefix):
            names = ("running_mean", "running_var", "weight", "bias")
            mean, *_ = base = [state_dict[prefix + name] for name in names]
            place = mean.device if self.mu.is_meta else self.mu.device
            values = self.start_from(*(t.to(place) for t in base))
            if self.num_batches_tracked is not None:
                count = counted_nothing(self.num_batches_tracked)
                state_dict.setdefault(prefix + "num_batches_tracked", count)
            else:
                for name in RUNNING:
                    state_dict.pop(prefix + name, None)
            for name, value in values.items():
                state_dict[prefix + name] = fitting(value, mean, *args[:1]).clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        options, default = asdict(self.options), asdict(AdaptiveOptions(self.options.components))
        changed = [f"{name}={v!r}" for name, v in options.items() if v != default[name]]
        return ", ".join([f"{self.num_features}, components={self.options.components}", *changed])
