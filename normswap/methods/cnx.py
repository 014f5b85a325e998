"""CN-X: a learned mean and spread for each context."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from normswap.functional.moments import Moments, log_spread
from normswap.methods.base import Contexts, Method, affine_tensors, register_method
from normswap.methods.cnx_batch import BatchContextNormX
from normswap.methods.cnx_layer import ContextNormX
from normswap.methods.instance import ContextInstanceNorm, settings_of
from normswap.methods.norm_values import is_trained
from normswap.sites import Site
from normswap.util.arguments import check_choice

_STATISTICS = ("learned", "batch")


@dataclass(frozen=True)
class ContextXOptions:
    """Options of CN-X.

    Attributes:
        statistics: "learned", mu and sigma alone, in training as in eval; or "batch", mu and sigma
            of what batch norm makes of x, which a network that trains from scratch needs.

    Raises:
        UnknownNameError: neither.
    """

    statistics: str = "learned"

    def __post_init__(self) -> None:
        check_choice("statistics=", self.statistics, _STATISTICS)


@register_method
class ContextNormalizationX(Method):
    """CN-X as a replacement of batch norm; on an instance norm, an affine for each context."""

    name = "cn-x"
    title = "learned mean and spread for each context"

    options: ClassVar[type] = ContextXOptions

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        """Start every context as the layer is in eval mode; keep its affine."""
        if site.kind == "instance":
            return ContextInstanceNorm.from_site(site, source, contexts)
        batch = options.statistics == "batch"
        kind = partial(BatchContextNormX, momentum=site.momentum) if batch else ContextNormX
        layer: ContextNormX = kind(**settings_of(site, contexts), affine=site.affine)
        with torch.no_grad():
            if layer.weight is not None and layer.bias is not None:
                weight, bias = affine_tensors(source, site)
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            if batch:
                layer.take_running(source)
            else:
                layer.mu.copy_(source.running_mean)  # type: ignore[arg-type]
                spread = log_spread(source.running_var, site.eps)  # type: ignore[arg-type]
                layer.log_sigma.copy_(spread)
        layer.fresh = False
        return layer

    def advise(self, norms: list[nn.Module], options: Any) -> str | None:
        """Warn of a network that would train without normalisation."""
        untrained = sum(not is_trained(norm) for norm in norms)
        if options.statistics == "batch" or untrained < 2:
            return None
        return (
            f"{untrained} norms that were never trained become CN-X, which has no batch "
            "statistics: a network with nothing else trains from scratch as one without "
            "normalisation. Use statistics='batch', or select='first' for one of them"
        )

    def statistics(self, layer: nn.Module) -> Moments | None:
        """Return the mean and variance that each context is normalised with."""
        return layer.moments() if isinstance(layer, ContextNormX) else None
