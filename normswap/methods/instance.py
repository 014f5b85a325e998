"""Instance norm with an affine for each context, for the methods that act on an instance norm."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.functional.affine import Affine, centre_norm
from normswap.functional.moments import Moments, compute_dtype, wide_dtype
from normswap.functional.recomputation import in_backward
from normswap.functional.stat_maps import stat_affine
from normswap.functional.tables import apply_centred
from normswap.methods.base import Contexts, affine_tensors
from normswap.methods.layer import ContextLayer
from normswap.methods.layer_tensors import check_settings
from normswap.methods.norm_values import PlainNorm, added_prior, pick
from normswap.sites import Site


def settings_of(site: Site, contexts: Contexts) -> dict[str, Any]:
    """Return what every layer with contexts takes of a norm and of a conversion."""
    placed = {"num_features": site.num_features, "device": site.device, "dtype": site.dtype}
    known = {"num_contexts": contexts.count, "priors": contexts.priors}
    return {**placed, **known, "unknown": contexts.unknown, "eps": site.eps}


class ContextInstanceNorm(ContextLayer):
    """Conditional instance normalization.

    ``y = gamma_c * (x - mu) / sqrt(var + eps) + beta_c`` with mu and var (biased) of each channel
    of each instance, as InstanceNorm; running statistics, where the replaced layer has them, stay
    shared and as torch keeps them.

    Args:
        num_features: C.
        num_contexts: K.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics.
        track_running_stats: whether eval normalises with running statistics.
        priors: lambda, (K,); weighs the contexts' affine for samples without a label.
        unknown: policy for samples without a label; see `ContextLayer`. An instance norm has no
            statistics that tell contexts apart, so "posterior" is "pooled".
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x: (N, C, *) with at least one trailing dimension; parameters weight, bias: (K, C).

    Source: Dumoulin et al., "A Learned Representation for Artistic Style", ICLR 2017.
    """

    context_parameters = ("weight", "bias")
    stats_frozen = False  # `normswap.freeze` sets it: use the running statistics, leave them
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = False,
        priors: Tensor | None = None,
        unknown: str | int = "pooled",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, num_contexts, unknown, priors, device, dtype)
        check_settings(eps, momentum, {"track_running_stats": track_running_stats})
        self.eps, self.momentum = eps, momentum
        self.track_running_stats = track_running_stats
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_contexts, num_features, **options))
        self.bias = nn.Parameter(torch.empty(num_contexts, num_features, **options))
        self.add_running((num_features,), (), options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the identity affine; running statistics, where there are some, to their start."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @classmethod
    def from_site(cls, site: Site, source: nn.Module, contexts: Contexts) -> "ContextInstanceNorm":
        """Build one that computes what an instance norm computes, for every context."""
        settings = {**settings_of(site, contexts), "momentum": site.momentum}
        layer = cls(**settings, track_running_stats=site.tracked)
        weight, bias = affine_tensors(source, site)
        with torch.no_grad():
            layer.weight.copy_(weight.expand_as(layer.weight))
            layer.bias.copy_(bias.expand_as(layer.bias))
        layer.take_running(source)
        return layer

    def forward(self, input: Tensor, context: Any = None) -> Tensor:
        """Normalise input; an input without a batch dimension counts as one sample."""
        if isinstance(input, Tensor) and self.dims and input.dim() == self.dims[0] - 1:
            return super().forward(input.unsqueeze(0), context).squeeze(0)
        return super().forward(input, context)

    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class."""
        mean, var = self.running_mean, self.running_var
        # Where tracking is switched off, torch's norm takes, and moves them by, instances in eval.
        training = (self.training or not self.track_running_stats) and not self.stats_frozen
        if training or mean is None or var is None:
            # The glue keeps numbers alone: x has to be free while checkpointing does not hold it.
            if (positions := x.shape[2:].numel()) == 1:
                raise ValueError(
                    "expected more than 1 spatial element for the statistics of an instance, got "
                    f"input {tuple(x.shape)} (at {self._where()})"
                )

            def glue(instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
                moves = training and not (replay or in_backward()) and instances.mean.shape[0] > 0
                if moves and self.running_mean is not None:
                    self._update(instances, positions)
                weight, bias = (t.to(instances.mean.dtype) for t in tensors)
                affine = self._select(weight, bias, labels, unlabelled)
                scale = affine.scale * torch.rsqrt(instances.var + self.eps)
                return Affine(scale, affine.shift.expand_as(scale))

            return stat_affine(x, glue, self.weight, self.bias)
        dtype = compute_dtype(x)
        affine = self._select(self.weight.to(dtype), self.bias.to(dtype), labels, unlabelled)
        # Copies: a later training forward updates the buffers in place.
        moments = Moments(*(t.to(dtype, copy=True).unsqueeze(0) for t in (mean, var)))
        table = centre_norm(moments, *affine, self.eps)
        centre = moments.mean.expand_as(table.scale)
        return apply_centred(x, table._replace(centre=centre))

    def _update(self, instances: Moments, positions: int) -> None:
        """Move the running statistics as torch does: averages over instances, unbiased variance."""
        mean, var = (t.detach().mean(0) for t in instances)
        self.move_running(mean, var * (positions / max(positions - 1, 1)), self.momentum or 0.0)

    def _select(
        self, weight: Tensor, bias: Tensor, labels: Tensor | None, unlabelled: bool
    ) -> Affine:
        """Return gamma and beta of each instance, or the one row of samples without a label."""
        if labels is None:
            return self._unknown(weight, bias)
        known = Affine(weight, bias).rows(labels.clamp(min=0) if unlabelled else labels)
        return known.where(labels >= 0, self._unknown(weight, bias)) if unlabelled else known

    def _unknown(self, weight: Tensor, bias: Tensor) -> Affine:
        row = self.row_unlabelled(weight, bias)
        if row is not None:
            return Affine(*row)
        return Affine(weight, bias).mix(self.mixing(weight.dtype).unsqueeze(0))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept an InstanceNorm's entries too; one without an affine has none."""
        for name, fresh in (("weight", 1.0), ("bias", 0.0)):
            own = self.get_parameter(name).detach()
            own = torch.full_like(own, fresh, device="cpu") if own.is_meta else own
            state_dict.setdefault(prefix + name, own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def plain(self, context: int | None) -> PlainNorm:
        """Return the instance norm this layer is, for a context; None for the mean affine."""
        priors = self.mixing(wide_dtype(self.priors))
        weight, bias = (pick(t, context, priors) for t in (self.weight, self.bias))
        return PlainNorm(self.running_mean, self.running_var, weight, bias)

    def added_rows(self, like: int | None, share: float) -> dict[str, Tensor]:
        """Return the rows of one more context; see `Method.added_rows`."""
        _, _, weight, bias, _ = self.plain(like)
        return {"weight": weight, "bias": bias, "priors": added_prior(self.priors, share)}
