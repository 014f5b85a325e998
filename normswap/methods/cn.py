"""CN, context normalization: batch statistics and an affine for each context."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.distributed import group_name, sum_over, sum_over_ddp
from normswap.functional.affine import Centred, centre_norm, fold_norm
from normswap.functional.backward import in_backward
from normswap.functional.context import norm_contexts
from normswap.functional.moments import (
    Moments,
    combine_moments,
    compute_dtype,
    context_posterior,
    instance_moments,
    pool_moments,
)
from normswap.functional.tables import apply_centred
from normswap.methods.base import (
    Contexts,
    Method,
    affine_tensors,
    register_method,
)
from normswap.methods.instance import ContextInstanceNorm
from normswap.methods.layer import ContextLayer, adopt, fill_affine, load_shared, make_priors
from normswap.methods.plain import Plain, added_prior, pick, pick_moments
from normswap.sites import Site


class ContextNorm(ContextLayer):
    """Context normalization (CN).

    ``y = (gamma_c * (x - mu_c) / sqrt(var_c + eps) + beta_c) / sqrt(lambda_c)`` for a sample of
    context c. In training, mu_c and var_c (biased) are over the samples of c in the batch and all
    positions; in eval, the running statistics of c. Running statistics move as BatchNorm's do
    (unbiased variance), only for contexts in the batch. A context with a single value per channel
    is normalised with its running statistics and does not update them; so are samples labelled -1,
    with those the policy `unknown` names.

    Args:
        num_features: C.
        num_contexts: K.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics, in [0, 1]; None keeps the
            cumulative average.
        priors: lambda, (K,), positive, sums to one; uniform by default.
        unknown: policy for samples without a label; see `ContextLayer`.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        synced: in training, take mu_c and var_c over the batches of all processes, as
            SyncBatchNorm does, or of those in the group that the attribute `process_group` names.
            Processes may have batches of different sizes, even empty, and lack contexts; all take
            part in every training forward and backward. Without it, DistributedDataParallel
            leaves the normalisation to each process, and the running statistics take the samples
            of all.

    Shape:
        x: (N, C, *); context: (N,). Parameters weight, bias: (K, C); buffers running_mean,
        running_var: (K, C), num_batches_tracked, priors: (K,).

    Source: Faye et al., arXiv 2403.16798, CN.
    Differs from source: channels are dimension 1; parameters exist before the first forward;
    eval uses running statistics; labels out of range are an error instead of passing through.
    """

    context_parameters = ("weight", "bias")
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    priors: Tensor
    _first_run: Moments | None = None

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        priors: Tensor | None = None,
        unknown: str | int = "pooled",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        synced: bool = False,
    ) -> None:
        super().__init__(num_features, num_contexts, unknown)
        self.eps = eps
        self.momentum = momentum
        self.frozen = False
        self.synced = synced
        self.process_group: str | None = None
        shape = (num_contexts, num_features)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(shape, **options))
        self.register_buffer("running_mean", torch.empty(shape, **options))
        self.register_buffer("running_var", torch.empty(shape, **options))
        self.register_buffer(
            "num_batches_tracked", torch.zeros(num_contexts, dtype=torch.int64, device=device)
        )
        self.register_buffer("priors", make_priors(priors, num_contexts, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set zero mean, unit variance, and the affine that makes every context's output equal."""
        with torch.no_grad():
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
            self.weight.copy_(self.priors.sqrt().unsqueeze(1).expand_as(self.weight))
            self.bias.zero_()

    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class."""
        dtype = compute_dtype(x)
        running = Moments(self.running_mean.to(dtype), self.running_var.to(dtype))
        if self.training or torch.is_grad_enabled():
            # Updates are in place, by this forward or a later one; these values are still needed.
            running = Moments(running.mean.clone(), running.var.clone())
            running = self._at_first_run(running)
        weight, bias = self._scaled(dtype)
        frozen = self.frozen or self.stats_frozen
        if labels is not None and self.training and not frozen:
            return self._train_step(x, labels, unlabelled, running, weight, bias)
        if labels is None:
            return apply_centred(x, self._unknown(x, None, running, weight, bias))
        table = centre_norm(running, weight, bias, self.eps)
        if not unlabelled:
            return apply_centred(x, table, labels if self.num_contexts > 1 else None)
        other = self._unknown(x, None, running, weight, bias)
        return apply_centred(x, table.rows(labels.clamp(min=0)).where(labels >= 0, other))

    def _at_first_run(self, running: Moments) -> Moments:
        """Return what the running statistics were when this forward first ran.

        Gradient checkpointing runs it again, after its update; samples without a label have to
        meet the same statistics then. Of several forwards before one backward, the last counts.
        In eval mode nothing moves them.
        """
        if not self.training:
            return running
        if torch.compiler.is_compiling():
            # The compiler computes again in backward what is cheap, from the buffers as updated
            # (pytorch/pytorch#197039), but keeps the result of a flip.
            return Moments(*(t.flip(0).flip(0) for t in running))
        if in_backward():
            return self._first_run or running
        self._first_run = running
        return running

    def _scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return gamma and beta over sqrt(lambda)."""
        scale = self.priors.to(dtype).rsqrt().unsqueeze(1)
        return self.weight.to(dtype) * scale, self.bias.to(dtype) * scale

    def _train_step(
        self,
        x: Tensor,
        labels: Tensor,
        unlabelled: bool,
        running: Moments,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Normalise with each context's moments in this batch, and update the running ones."""
        index, given, override = labels, running, None
        if unlabelled:
            # One more context, whose moments are given.
            index = torch.where(labels < 0, self.num_contexts, labels)
            row = self._unknown_row(running, weight, bias)
            given = Moments(*(torch.cat(pair) for pair in zip(running, row[0], strict=True)))
            weight, bias = torch.cat((weight, row[1])), torch.cat((bias, row[2]))
            if self.unknown == "posterior" and self.num_contexts > 1:
                override = partial(self._mix_unlabelled, labels, running)
        reduce = sum_over(self.process_group) if self.synced else None
        return norm_contexts(
            x,
            index,
            weight,
            bias,
            given,
            self.num_contexts,
            self.eps,
            self._update,
            reduce,
            override,
        )

    def _mix_unlabelled(
        self,
        labels: Tensor,
        running: Moments,
        table: Centred,
        instances: Moments,
        weight: Tensor,
        bias: Tensor,
    ) -> Centred:
        """Give samples without a label the map of policy "posterior"."""
        known = (t[: self.num_contexts] for t in (weight, bias))
        return table.where(labels >= 0, self._unknown(None, instances, running, *known))

    @torch.no_grad()
    def _update(self, used: Moments, values: Tensor) -> None:
        """Move the running statistics; where a context had no moments, `used` holds them."""
        if in_backward():
            return
        reduce = None if self.synced else sum_over_ddp()
        if reduce is not None:
            # The wrapper gives every process the buffers of the first one, before each forward:
            # contexts that only others have would never be updated.
            values, used = self._of_all(values, used, reduce)
        usable = values > 1
        self.num_batches_tracked.add_(usable.squeeze(1))
        rate: Any = self.momentum
        if rate is None:
            rate = self.num_batches_tracked.clamp(min=1).to(values.dtype).reciprocal().unsqueeze(1)
        unbiased = used.var * torch.where(usable, values / (values - 1), 1)
        for buffer, new in ((self.running_mean, used.mean), (self.running_var, unbiased)):
            buffer.copy_(torch.lerp(buffer.to(new.dtype), new, rate))

    def _of_all(
        self, values: Tensor, used: Moments, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Moments]:
        """Combine the moments of contexts with what other processes have of them."""
        values = torch.where(values > 1, values, 0)
        values, found = combine_moments(values, used, reduce)
        running = (self.running_mean, self.running_var)
        new = (torch.where(values > 1, f, r.to(f)) for f, r in zip(found, running, strict=True))
        return values, Moments(*new)

    def _unknown(
        self,
        x: Tensor | None,
        instances: Moments | None,
        running: Moments,
        weight: Tensor,
        bias: Tensor,
    ) -> Centred:
        """Return the map of samples without a label: one row, or one a sample ("posterior")."""
        if self.unknown == "posterior" and self.num_contexts > 1:
            if instances is None:
                assert x is not None
                instances = instance_moments(x)
            priors = self.mixing(weight.dtype)
            weights = context_posterior(instances, running, priors, self.eps)
            return fold_norm(running, weight, bias, self.eps).mix(weights).centred()
        return centre_norm(*self._unknown_row(running, weight, bias), self.eps)

    def _unknown_row(
        self, running: Moments, weight: Tensor, bias: Tensor
    ) -> tuple[Moments, Tensor, Tensor]:
        """Return moments, gamma and beta of the one row, (1, C), that unknown labels take."""
        if isinstance(self.unknown, int):
            row = slice(self.unknown, self.unknown + 1)
            return Moments(running.mean[row], running.var[row]), weight[row], bias[row]
        if self.unknown == "error":
            # Reached only where the host cannot see the labels; wrong results must be visible.
            nan = torch.full_like(running.mean[:1], torch.nan)
            return Moments(nan, nan), torch.full_like(weight[:1], torch.nan), nan
        mixing = self.mixing(weight.dtype).unsqueeze(1)
        return (
            pool_moments(running, mixing),
            (mixing * weight).sum(0, keepdim=True),
            (mixing * bias).sum(0, keepdim=True),
        )

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        return super().extra_repr() + (", synced=True" if self.synced else "")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a BatchNorm's entries too: each context starts from them."""
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if not isinstance(state_dict.get(prefix + "priors"), Tensor):
            state_dict[prefix + "priors"] = self.priors
        state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        root = state_dict[prefix + "priors"].sqrt().unsqueeze(1)
        targets: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        fill_affine(state_dict, prefix, self.num_features)
        load_shared(state_dict, prefix, targets, {"weight": root, "bias": root})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def plain(self, context: int | None) -> Plain:
        """Return the batch norm this layer is in eval mode for a context, None for the pooled."""
        count, priors = self.num_batches_tracked, self.mixing(torch.float64)
        running = Moments(self.running_mean, self.running_var)
        scale = self.priors.double().rsqrt().unsqueeze(1)
        return Plain(
            *pick_moments(running, context, priors),
            pick(self.weight * scale, context, priors),
            pick(self.bias * scale, context, priors),
            count.max() if context is None else count[context],
        )

    def added_rows(self, like: int | None, share: float) -> dict[str, Tensor]:
        """Return the rows of one more context; see `Method.added_rows`."""
        mean, var, weight, bias, batches = self.plain(like)
        prior = added_prior(self.priors, share)
        affine = {"weight": weight * prior.sqrt(), "bias": bias * prior.sqrt(), "priors": prior}
        statistics = {"running_mean": mean, "running_var": var, "num_batches_tracked": batches}
        return {name: t for name, t in (affine | statistics).items() if t is not None}

    @torch.no_grad()
    def set_moments(self, context: int, moments: Moments) -> None:
        """Set the running statistics of a context, (C,) each."""
        self.running_mean[context], self.running_var[context] = moments


@register_method
class ContextNormalization(Method):
    """CN as a replacement of batch norm; on an instance norm, an affine for each context."""

    name = "cn"
    title = "batch statistics and an affine for each context"

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        """Copy the layer's statistics to each context, and its affine times sqrt(lambda)."""
        if site.kind == "instance":
            return ContextInstanceNorm.from_site(site, source, contexts)
        layer = ContextNorm(
            site.num_features,
            contexts.count,
            site.eps,
            site.momentum,
            contexts.priors,
            contexts.unknown,
            site.device,
            site.dtype,
            site.synced,
        )
        weight, bias = affine_tensors(source, site)
        root = contexts.priors.sqrt().unsqueeze(1).to(site.device)
        with torch.no_grad():
            layer.weight.copy_(root * weight)
            layer.bias.copy_(root * bias)
            layer.running_mean.copy_(source.running_mean)  # type: ignore[arg-type]
            layer.running_var.copy_(source.running_var)  # type: ignore[arg-type]
            tracked = getattr(source, "num_batches_tracked", None)
            if tracked is not None:
                layer.num_batches_tracked.copy_(tracked)
        layer.frozen = site.frozen
        layer.process_group = group_name(source) if site.synced else None
        layer.names = contexts.names
        adopt(layer, source, site)
        return layer

    def statistics(self, layer: nn.Module) -> Moments | None:
        """Return the running statistics."""
        if not isinstance(layer, ContextNorm):
            return None
        return Moments(layer.running_mean, layer.running_var)
