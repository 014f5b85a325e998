"""The layer of CN-X: a learned mean and spread for each context, no batch statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.functional.affine import Centred, centre_norm, pool_norm
from normswap.functional.label_rows import one_label
from normswap.functional.moments import (
    Moments,
    compute_dtype,
    context_moments,
    context_posterior,
    instance_moments,
    log_spread,
    wide_dtype,
    widen,
)
from normswap.functional.tables import apply_by_label
from normswap.methods.layer import ContextLayer
from normswap.methods.layer_tensors import (
    check_own,
    check_settings,
    fill_affine,
    fitting,
    holds_base,
)
from normswap.methods.norm_values import PlainNorm, added_prior, pick_moments
from normswap.methods.running import RUNNING
from normswap.util.distributed import sum_over, sum_over_ddp
from normswap.util.original_class import ORIGINAL


class Learned(NamedTuple):
    """What a layer has learned: mu and log sigma, (K, C), gamma and beta, (C,)."""

    mu: Tensor
    log_sigma: Tensor
    weight: Tensor
    bias: Tensor

    def table(self) -> Centred:
        """Return ``weight * (x - mu) / sigma + bias`` as a map of each context."""
        scale = self.weight * torch.exp(-self.log_sigma)
        return Centred(self.mu, scale, self.bias.expand_as(self.mu))


class ContextNormX(ContextLayer):
    """Context normalization with learned statistics (CN-X).

    ``y = gamma * (x - mu_c) / sigma_c + beta`` for a sample of context c; mu and log sigma are
    learned, and training and eval compute the same.

    Args:
        num_features: C.
        num_contexts: K.
        eps: added to the variance where mu and sigma start from data.
        affine: whether to learn gamma and beta.
        priors: lambda, (K,), positive, sums to one; uniform by default. Weighs the contexts for
            samples without a label.
        unknown: policy for samples without a label; see `ContextLayer`.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x: (N, C, *); context: (N,). Parameters mu, log_sigma: (K, C), weight, bias: (C,);
        buffer priors: (K,).

    A fresh layer starts mu and sigma from its first batch in training mode: each context from its
    own samples, contexts absent there or with one value from the whole batch. A batch with one
    value per channel, or none, is no start. Within DistributedDataParallel, or with `synced`, the
    batch is that of all processes, which then start alike.

    Source: Faye et al., arXiv 2403.16798, CN-X.
    Differs from source: the layer keeps a shared gamma and beta; starts from data or from a batch
    norm instead of Xavier, which is nearly an identity; sigma is positive by its logarithm.
    """

    context_parameters = ("mu", "log_sigma")
    kernels = "learned_norm"
    read = ("priors", "mu", "log_sigma", "weight", "bias")
    most_weighed = 64
    track_running_stats = False
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    mu: nn.Parameter
    log_sigma: nn.Parameter

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        eps: float = 1e-5,
        affine: bool = True,
        priors: Tensor | None = None,
        unknown: str | int = "pooled",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, num_contexts, unknown, priors, device, dtype)
        check_settings(eps, None, {"affine": affine})
        self.eps, self.affine = eps, affine
        self.fresh, self.synced = True, False
        self.process_group: str | None = None
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, **options)) if affine else None
            self.register_parameter(name, value)
        self.mu = nn.Parameter(torch.empty(num_contexts, num_features, **options))
        self.log_sigma = nn.Parameter(torch.empty(num_contexts, num_features, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the layer an identity that takes its statistics from the next training batch."""
        self.fresh = True
        with torch.no_grad():
            self.mu.zero_()
            self.log_sigma.zero_()
            if self.weight is not None and self.bias is not None:
                self.weight.fill_(1)
                self.bias.zero_()

    @torch.no_grad()
    def start_from(
        self, x: Tensor, labels: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Set mu and sigma from a batch; labels (N,) in [-1, K); reduce sums over processes."""
        instances, size = instance_moments(x.detach()), x.shape[2:].numel()
        index = torch.where(labels < 0, self.num_contexts, labels)
        values, moments = context_moments(instances, index, self.num_contexts, size, reduce)
        count, whole = context_moments(instances, torch.zeros_like(index), 1, size, reduce)
        if reduce is not None and not count > 1:
            return
        mean, var = moments.where((values > 1).unsqueeze(1), whole)
        self.mu.copy_(mean)
        self.log_sigma.copy_(0.5 * (var + self.eps).log())
        self.fresh = False

    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class."""
        if self.fresh and self.training and labels is not None:
            reduce = sum_over(self.process_group) if self.synced else sum_over_ddp()
            if reduce is not None or x.numel() > x.shape[1]:
                self.start_from(x, labels, reduce)
        if (found := self.find_triton(x, unlabelled)) is not None:
            triton, (priors, *given) = found
            labels = None if labels is None else one_label(labels)
            weighs = self.weighs(unlabelled)
            pooled = None if weighs else self.pooled_contexts(unlabelled)
            norm = triton.Norm(triton.KERNELS, given, priors, pooled, weighs)
            y: Tensor = triton.normalize(x, labels, norm)
            return y
        learned = self.learned(compute_dtype(x))
        unknown = partial(self.unknown_map, learned, partial(instance_moments, x))
        return apply_by_label(x, learned.table, labels, unlabelled, unknown)

    def learned(self, dtype: torch.dtype) -> Learned:
        """Return what the layer has learned, in a dtype."""
        mu, log_sigma = self.mu.to(dtype), self.log_sigma.to(dtype)
        if self.weight is None or self.bias is None:
            return Learned(mu, log_sigma, torch.ones_like(mu[0]), torch.zeros_like(mu[0]))
        return Learned(mu, log_sigma, self.weight.to(dtype), self.bias.to(dtype))

    def unknown_map(self, learned: Learned, instances: Callable[[], Moments]) -> Centred:
        """Return the map of samples without a label: one row, or one a sample ("posterior")."""
        mu, log_sigma, weight, bias = learned
        row = self.row_unlabelled(mu, log_sigma)
        if row is not None:
            if self.unknown == "error":  # or its NaN, even unused, becomes the gradient of gamma
                weight, bias = weight.detach(), bias.detach()
            return Learned(row[0], row[1], weight, bias).table()
        priors = self.mixing(mu.dtype)
        moments = Moments(mu, torch.exp(2 * log_sigma))
        if self.weighs(True):
            weights = context_posterior(instances(), moments, priors, 0.0)
            return learned.table().mix(weights)
        pooled, bias = pool_norm(moments, priors, weight, bias, 0.0)
        return centre_norm(pooled, weight, bias, 0.0)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a BatchNorm's entries too: each context starts as the batch norm."""
        if self.weight is not None:
            fill_affine(self, state_dict, prefix)
        self._read_base(state_dict, prefix, *args)
        self.load_priors(state_dict, prefix, state_dict.get(prefix + "mu"))
        # Statistics other than those of a layer that met no batch have started, and any of a layer
        # that replaced a norm.
        saved = [state_dict.get(prefix + name) for name in ("mu", "log_sigma")]
        given = [v for v in saved if isinstance(v, Tensor)]
        started = ORIGINAL in vars(self) or any(v.is_meta or bool(v.any()) for v in given)
        self.fresh = self.fresh and not (given and started)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _read_base(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Put mu and log sigma in the place of a BatchNorm's running statistics."""
        if holds_base(self, state_dict, prefix):
            mean, var, _ = (state_dict.pop(prefix + name, None) for name in RUNNING)
            log_sigma = fitting(log_spread(var, self.eps), var, *args[:1])
            state_dict[prefix + "mu"] = mean.expand(self.mu.shape).clone()
            state_dict[prefix + "log_sigma"] = log_sigma.expand(self.mu.shape).clone()

    def plain(self, context: int | None) -> PlainNorm:
        """Return the batch norm this layer is, for a context; None for the pooled.

        Its running variance is ``sigma^2 - eps``; where that is negative, 0, and its weight takes
        the factor ``sqrt(eps) / sigma`` that is left.
        """
        mean, var = self._learned(context)
        weight, bias = (t.detach() for t in self.learned(wide_dtype(self.mu))[2:])
        weight = torch.where(var < self.eps, weight * (self.eps / var).sqrt(), weight)
        return PlainNorm(mean, (var - self.eps).clamp(min=0), weight, bias)

    def moments(self) -> Moments:
        """Return mu and sigma^2, (K, C): what each context is normalised with."""
        return Moments(self.mu.detach(), (2 * self.log_sigma.detach()).exp())

    def _learned(self, context: int | None) -> Moments:
        """Return mu and sigma^2 of a context, or of the mixture, (C,) in `wide_dtype`."""
        moments = Moments(self.mu, (2 * widen(self.log_sigma)).exp())
        return pick_moments(moments, context, self.mixing(wide_dtype(self.mu)))

    def added_rows(self, like: int | None, share: float) -> dict[str, Tensor]:
        """Return the rows of one more context; see `Method.added_rows`."""
        mean, var = self._learned(like)
        prior = added_prior(self.priors, share)
        return {"mu": mean, "log_sigma": 0.5 * var.log(), "priors": prior}

    @torch.no_grad()
    def set_moments(self, context: int, moments: Moments) -> None:
        """Set mu and ``log sigma = log(var + eps) / 2`` of a context from statistics, (C,) each."""
        check_own(self, "mu", "log_sigma")
        self.mu[context] = moments.mean
        self.log_sigma[context] = log_spread(moments.var, self.eps)
