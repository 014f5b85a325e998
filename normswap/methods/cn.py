"""CN, context normalization: batch statistics and an affine for each context."""

from typing import Any

import torch
from torch import nn

from normswap.functional.moments import Moments
from normswap.methods.base import Contexts, Method, affine_tensors, register_method
from normswap.methods.cn_layer import ContextNorm
from normswap.methods.instance import ContextInstanceNorm
from normswap.methods.layer import adopt
from normswap.sites import Site
from normswap.util.distributed import group_name


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
