"""ACN, adaptive context normalization, as a method."""

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.functional.moments import Moments, wide_dtype, widen
from normswap.methods.acn_layer import AdaptiveContextNorm
from normswap.methods.acn_options import AdaptiveOptions
from normswap.methods.base import Contexts, Method, affine_tensors, register_method
from normswap.methods.norm_values import PlainNorm
from normswap.sites import Site


@register_method
class AdaptiveContextNormalization(Method):
    """ACN as a replacement of batch norm."""

    name = "acn"
    title = "a learned Gaussian mixture for each channel, no labels"
    needs_context = False
    input_dependent = True
    options: ClassVar[type] = AdaptiveOptions

    def refuse(self, site: Site) -> str | None:
        """Refuse an instance norm."""
        if site.kind == "instance":
            return (
                "acn normalises with statistics that instances share, and an instance norm has "
                "a set for each instance; cn and cn-x replace it"
            )
        return None

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        """Start all components from the layer's running statistics, told apart as asked."""
        placed = {"device": site.device, "dtype": site.dtype, "eps": site.eps}
        given = {**asdict(options), **placed, "momentum": site.momentum}
        layer = AdaptiveContextNorm(site.num_features, **given)
        mean, var = source.running_mean, source.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        layer.take_running(source)
        layer.set_values(layer.start_from(mean, var, *affine_tensors(source, site)))
        return layer

    def statistics(self, layer: nn.Module) -> Moments | None:
        """Return the moments that eval normalises with."""
        if not isinstance(layer, AdaptiveContextNorm):
            return None
        if layer.running_mean is not None and layer.running_var is not None:
            return Moments(layer.running_mean, layer.running_var)
        mixture = layer.mixture()
        return Moments(mixture.mean.detach(), (2 * mixture.log_sigma.detach()).exp())

    def weights(self, layer: nn.Module) -> Tensor | None:
        """Return lambda."""
        if not isinstance(layer, AdaptiveContextNorm):
            return None
        return layer.mixture().log_prior.detach().exp().expand_as(layer.mu)

    @torch.no_grad()
    def plain(self, layer: nn.Module, context: int | None) -> PlainNorm:
        """Return the batch norm that a layer is while its components are equal.

        Then ``tau_k = lambda_k`` for every input, and gamma takes ``sum_k sqrt(lambda_k)``.
        """
        assert isinstance(layer, AdaptiveContextNorm)
        mixture = layer.mixture(wide_dtype(layer.mu))
        tables = [mixture.mean, (2 * mixture.log_sigma).exp() - layer.eps]
        if layer.running_mean is not None and layer.running_var is not None:
            tables += map(widen, (layer.running_mean, layer.running_var))
        if any(not torch.equal(t, t[:1].expand_as(t)) for t in tables):
            raise ConversionError(
                "its map depends on the input: each value is normalised by the components it "
                "probably belongs to, and these have moved apart"
            )
        gain = (0.5 * mixture.log_prior).exp().expand_as(mixture.mean).sum(0)
        mean, var, weight = tables[-2][0], tables[-1][0].clamp(min=0), widen(layer.weight) * gain
        return PlainNorm(mean, var, weight, widen(layer.bias), layer.num_batches_tracked)
