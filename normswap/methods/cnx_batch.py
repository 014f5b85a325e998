"""CN-X on what batch norm makes of x: statistics of the batch, then a context's own map."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from normswap.functional.affine import Affine, Centred
from normswap.functional.moments import (
    Moments,
    compute_dtype,
    context_moments,
    instance_moments,
    log_spread,
    wide_dtype,
    widen,
)
from normswap.functional.stat_maps import stat_affine
from normswap.functional.tables import apply_centred
from normswap.methods.cnx_layer import ContextNormX, Learned
from normswap.methods.layer_tensors import check_own, check_settings, counted_nothing, holds_base
from normswap.methods.norm_values import PlainNorm
from normswap.util.distributed import sum_over


class BatchContextNormX(ContextNormX):
    """CN-X with batch statistics.

    ``z = (x - m) / sqrt(v + eps)``, ``y = gamma * (z - mu_c) / sigma_c + beta`` for a sample of
    context c. In training m and v (biased) are over the whole batch and all positions, samples
    without a label included; in eval, running averages, which move as BatchNorm's do. mu and
    log sigma are learned and start at 0, where the layer is the batch norm. A batch with one value
    per channel is normalised with the running statistics and moves nothing.

    Args:
        num_features: C.
        num_contexts: K.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None keeps the cumulative
            average.
        affine: whether to learn gamma and beta.
        priors: lambda, (K,), positive, sums to one; uniform by default.
        unknown: policy for samples without a label; see `ContextLayer`. Contexts are told apart,
            and pooled, by mu and sigma of z.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x: (N, C, *); context: (N,). Parameters mu, log_sigma: (K, C), weight, bias: (C,); buffers
        running_mean, running_var: (C,), num_batches_tracked: (), priors: (K,).

    Source: Faye et al., arXiv 2403.16798, CN-X.
    Differs from source: there is a batch norm below. Without it a network in which CN-X replaces
    every norm trains from scratch as one without normalisation does.
    """

    track_running_stats = True
    stats_frozen = False  # `normswap.freeze` sets it: use the running statistics, leave them
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        priors: Tensor | None = None,
        unknown: str | int = "pooled",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, num_contexts, eps, affine, priors, unknown, device, dtype)
        check_settings(eps, momentum)
        self.momentum, self.frozen = momentum, False
        self.add_running((num_features,), (), {"device": device, "dtype": dtype})
        self.reset_running_stats()
        self.fresh = False

    def reset_parameters(self) -> None:
        """Make the layer a fresh batch norm."""
        super().reset_parameters()
        if "running_mean" in self._buffers:
            self.reset_running_stats()
            self.fresh = False

    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class."""
        if not self.synced and self.find_triton(x, unlabelled) is not None:
            return super().normalize(self._batch_normalised(x), labels, unlabelled)
        dtype = compute_dtype(x)
        running = Moments(*(t.to(dtype)[None] for t in (self.running_mean, self.running_var)))
        learned = self.learned(dtype)

        def table(instances: Callable[[], Moments], whole: Moments, learned: Learned) -> Centred:
            """Return the map of each sample, or of all; x is normalised with `whole`."""
            inverse = torch.rsqrt(whole.var + self.eps)

            def of_z() -> Moments:
                mean, var = instances()
                return Moments((mean - whole.mean) * inverse, var * inverse.square())

            if labels is None:
                found = self.unknown_map(learned, of_z)
            else:
                found = learned.table().rows(labels.clamp(min=0) if unlabelled else labels)
                if unlabelled:
                    found = found.where(labels >= 0, self.unknown_map(learned, of_z))
            # y = (z - c) s + t, about the mean of x: mu may be large only where sigma is.
            shift = torch.addcmul(found.shift, found.centre, found.scale, value=-1)
            return Centred(whole.mean.expand_as(shift), found.scale * inverse, shift)

        if not self.training or self.frozen or self.stats_frozen:
            return apply_centred(x, table(lambda: instance_moments(x), running, learned))
        running = Moments(*(t.clone() for t in running))
        size = x.shape[2:].numel()
        reduce = sum_over(self.process_group) if self.synced else None

        def glue(instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
            everyone = torch.zeros_like(instances.mean[:, 0], dtype=torch.int64)
            values, batch = context_moments(instances, everyone, 1, size, reduce)
            used = batch.where(values.unsqueeze(1) > 1, running)
            if not replay:
                self._update(used, values)
            found = table(lambda: instances, used, Learned(*tensors))
            rows = [t.expand_as(instances.mean) for t in found]
            return Centred(*rows).at(instances.mean)

        return stat_affine(x, glue, *learned)

    def _batch_normalised(self, x: Tensor) -> Tensor:
        """Return z by torch's own batch norm, which on a GPU is one kernel; see the class."""
        by_running = not self.training or self.frozen or self.stats_frozen
        if by_running or x.numel() <= x.shape[1]:
            running = (self.running_mean.float(), self.running_var.float())
            return batch_norm(x, *running, training=False, eps=self.eps)
        mean, var = x.new_zeros(2, x.shape[1], dtype=torch.float32).unbind()
        z = batch_norm(x, mean, var, training=True, momentum=1.0, eps=self.eps)
        if not self.keeps_stats():
            self.num_batches_tracked.add_(1)
            self.move_running(mean, var, self.running_rate(mean.dtype))
        return z

    @torch.no_grad()
    def _update(self, used: Moments, values: Tensor) -> None:
        """Move the running statistics as batch norm does."""
        if self.keeps_stats():
            return
        usable = (values > 1).to(values.dtype)
        self.num_batches_tracked.add_(usable.sum().to(torch.int64))
        unbiased = used.var[0] * (values / (values - 1).clamp(min=1))
        rate = (self.running_rate(values.dtype) * usable).expand_as(unbiased)
        self.move_running(used.mean[0], unbiased, rate)

    def _read_base(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Add mu and log sigma of 0 to the entries of a BatchNorm."""
        if prefix + "mu" in state_dict or not holds_base(self, state_dict, prefix):
            return
        mean, count = state_dict[prefix + "running_mean"], counted_nothing(self.num_batches_tracked)
        state_dict.setdefault(prefix + "num_batches_tracked", count)
        fresh = {prefix + name: mean.new_zeros(self.mu.shape) for name in ("mu", "log_sigma")}
        state_dict.update(fresh)

    def plain(self, context: int | None) -> PlainNorm:
        """Return the batch norm this layer is in eval mode, for a context; None for the pooled."""
        mean, var = self._learned(context)
        whole = widen(self.running_var.detach()) + self.eps
        weight, bias = (t.detach() for t in self.learned(wide_dtype(self.mu))[2:])
        total = var * whole
        weight = torch.where(total < self.eps, weight * (self.eps / total).sqrt(), weight)
        centre = widen(self.running_mean.detach()) + mean * whole.sqrt()
        count = self.num_batches_tracked
        return PlainNorm(centre, (total - self.eps).clamp(min=0), weight, bias, count)

    def moments(self) -> Moments:
        """Return mean and variance of x that each context is normalised with in eval, (K, C)."""
        whole = self.running_var + self.eps
        mean = self.running_mean + self.mu.detach() * whole.sqrt()
        return Moments(mean, (2 * self.log_sigma.detach()).exp() * whole)

    @torch.no_grad()
    def set_moments(self, context: int, moments: Moments) -> None:
        """Set mu and log sigma of a context from statistics of x, (C,) each."""
        check_own(self, "mu", "log_sigma")
        whole = widen(self.running_var) + self.eps
        mean = widen(moments.mean) - widen(self.running_mean)
        self.mu[context] = mean / whole.sqrt()
        self.log_sigma[context] = log_spread(moments.var, self.eps) - 0.5 * whole.log()
