"""What a layer of CN keeps: an affine and running statistics for each context."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.functional.moments import Moments
from normswap.methods.layer import ContextLayer
from normswap.methods.layer_tensors import check_settings, counted_nothing, fill_affine, load_shared
from normswap.methods.norm_values import PlainNorm, added_prior, pick, pick_moments


class ContextTables(ContextLayer):
    """Base of `ContextNorm`: its tensors, and the plain norms they stand for.

    Shape:
        Parameters weight, bias: (K, C); buffers running_mean, running_var: (K, C),
        num_batches_tracked, priors: (K,).
    """

    context_parameters = ("weight", "bias")
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    priors: Tensor

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
        check_settings(eps, momentum, {"synced": synced})
        self.eps = eps
        self.momentum = momentum
        self.frozen = False
        self.synced = synced
        self.process_group: str | None = None
        shape = (num_contexts, num_features)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(shape, **options))
        self._add_running(shape, (num_contexts,), options)
        self.add_priors(priors, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set zero mean, unit variance, and the affine that makes every context's output equal."""
        self.reset_running_stats()
        with torch.no_grad():
            self.weight.copy_(self.priors.sqrt().unsqueeze(1).expand_as(self.weight))
            self.bias.zero_()

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        return super().extra_repr() + (", synced=True" if self.synced else "")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a BatchNorm's entries too: each context starts from them."""
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        self.load_priors(state_dict, prefix, state_dict.get(prefix + "running_mean"))
        count = counted_nothing(self.num_batches_tracked)
        state_dict.setdefault(prefix + "num_batches_tracked", count)
        root = state_dict[prefix + "priors"].sqrt().unsqueeze(1)
        targets: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        fill_affine(state_dict, prefix, self.num_features)
        load_shared(state_dict, prefix, targets, {"weight": root, "bias": root})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def plain(self, context: int | None) -> PlainNorm:
        """Return the batch norm this layer is in eval mode for a context, None for the pooled."""
        count, priors = self.num_batches_tracked, self.mixing(torch.float64)
        running = Moments(self.running_mean, self.running_var)
        scale = self.priors.double().rsqrt().unsqueeze(1)
        return PlainNorm(
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
