"""What a layer of CN keeps: an affine and running statistics for each context."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normswap.functional.moments import Moments, as_dtype, wide_dtype
from normswap.methods.layer import ContextLayer
from normswap.methods.layer_tensors import check_settings, counted_nothing, fill_affine, load_shared
from normswap.methods.norm_values import PlainNorm, added_prior, pick, pick_moments
from normswap.methods.running import RUNNING
from normswap.util.arguments import check_choice, check_number

AFFINE = ("context", "shared")


def check_affine(shrink: float, affine: str) -> None:
    """Check what CN may be set to besides: shrink in [0, 1e9] or infinity, one of `AFFINE`."""
    if not (isinstance(shrink, float) and shrink == math.inf):
        check_number("shrink", shrink, 0, 1e9)
    check_choice("affine=", affine, AFFINE)


class ContextTables(ContextLayer):
    """Base of `ContextNorm`: its tensors, and the plain norms they stand for."""

    context_parameters: tuple[str, ...] = ("weight", "bias")
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        priors: Tensor | None = None,
        unknown: str | int = "posterior",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        synced: bool = False,
        shrink: float = 0.0,
        affine: str = "context",
    ) -> None:
        super().__init__(num_features, num_contexts, unknown, priors, device, dtype)
        check_settings(eps, momentum, {"synced": synced})
        check_affine(shrink, affine)
        self.eps, self.momentum = eps, momentum
        self.frozen, self.synced = False, synced
        self.process_group: str | None = None
        self.shrink = float(shrink)
        self.shared_affine = affine == "shared"
        if self.shared_affine:
            self.context_parameters = ()
        shape = (num_contexts, num_features)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        affine_shape = shape[1:] if self.shared_affine else shape
        self.weight = nn.Parameter(torch.empty(affine_shape, **options))
        self.bias = nn.Parameter(torch.empty(affine_shape, **options))
        self.add_running(shape, (num_contexts,), options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set zero mean, unit variance, and the affine that makes every context's output equal."""
        self.reset_running_stats()
        with torch.no_grad():
            self.weight.copy_(self._root().expand_as(self.weight))
            self.bias.zero_()

    def _root(self) -> Tensor:
        """Return what an affine is multiplied with to be this layer's: sqrt(lambda), (K, 1)."""
        if self.shared_affine:
            return torch.ones_like(self.priors[:1])
        return self.priors.sqrt().unsqueeze(1)

    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Give every context the affine of a batch norm, (C,) each."""
        with torch.no_grad():
            self.weight.copy_(self._root() * weight)
            self.bias.copy_(self._root() * bias)

    def affine_factor(self, dtype: torch.dtype) -> Tensor:
        """Return the factor of gamma and beta, (K, 1): 1 / sqrt(lambda), 1 if they are shared."""
        priors = as_dtype(self.priors, dtype).unsqueeze(1)
        return torch.ones_like(priors) if self.shared_affine else priors.rsqrt()

    def effective_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return gamma and beta over sqrt(lambda), or those that all share, (K, C)."""
        factor = self.affine_factor(dtype)
        return as_dtype(self.weight, dtype) * factor, as_dtype(self.bias, dtype) * factor

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        synced = ", synced=True" if self.synced else ""
        shrink = f", shrink={self.shrink:g}" if self.shrink else ""
        affine = ", affine='shared'" if self.shared_affine else ""
        return super().extra_repr() + synced + shrink + affine

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a BatchNorm's entries too: each context starts from them."""
        fill_affine(self, state_dict, prefix)
        self.load_priors(state_dict, prefix, state_dict.get(prefix + "running_mean"))
        count = counted_nothing(self.num_batches_tracked)
        state_dict.setdefault(prefix + "num_batches_tracked", count)
        root = state_dict[prefix + "priors"].sqrt().unsqueeze(1)
        targets = {name: getattr(self, name) for name in (*self.context_parameters, *RUNNING)}
        load_shared(state_dict, prefix, targets, {"weight": root, "bias": root})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def plain(self, context: int | None) -> PlainNorm:
        """Return the batch norm this layer is in eval mode for a context, None for the pooled."""
        count, wide = self.num_batches_tracked, wide_dtype(self.running_mean)
        priors = self.mixing(wide)
        running = Moments(self.running_mean, self.running_var)
        weight, bias = (pick(t, context, priors) for t in self.effective_affine(wide))
        batches = count.max() if context is None else count[context]
        return PlainNorm(*pick_moments(running, context, priors), weight, bias, batches)

    def added_rows(self, like: int | None, share: float) -> dict[str, Tensor]:
        """Return the rows of one more context; see `Method.added_rows`."""
        mean, var, weight, bias, batches = self.plain(like)
        prior = added_prior(self.priors, share)
        rows: dict[str, Tensor | None] = {"running_mean": mean, "running_var": var}
        rows |= {"num_batches_tracked": batches, "priors": prior}
        if not self.shared_affine:
            rows |= {"weight": weight * prior.sqrt(), "bias": bias * prior.sqrt()}
        return {name: t for name, t in rows.items() if t is not None}

    @torch.no_grad()
    def set_moments(self, context: int, moments: Moments) -> None:
        """Set the running statistics of a context, (C,) each."""
        self.running_mean[context], self.running_var[context] = moments
