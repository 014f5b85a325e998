"""CN, context normalization: batch statistics and an affine for each context."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from normswap.functional.moments import Moments
from normswap.methods.base import Contexts, Method, affine_tensors, register_method
from normswap.methods.cn_layer import ContextNorm
from normswap.methods.cn_tables import check_affine
from normswap.methods.instance import ContextInstanceNorm, settings_of
from normswap.sites import Site


@dataclass(frozen=True)
class ContextOptions:
    """Options of CN.

    Attributes:
        shrink: how many samples' worth of the whole batch the statistics of a context take in;
            see `ContextNorm`.
        affine: "context", one for each, or "shared", one for all contexts.

    Raises:
        ConversionError: shrink below 0, or no number.
        UnknownNameError: affine is neither.
    """

    shrink: float = 0.0
    affine: str = "context"

    def __post_init__(self) -> None:
        check_affine(self.shrink, self.affine)


@register_method
class ContextNormalization(Method):
    """CN as a replacement of batch norm; on an instance norm, an affine for each context."""

    name = "cn"
    title = "batch statistics and an affine for each context"
    unknown = "posterior"
    options: ClassVar[type] = ContextOptions

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        """Copy the layer's statistics to each context, and its affine times sqrt(lambda)."""
        if site.kind == "instance":
            return ContextInstanceNorm.from_site(site, source, contexts)
        settings = {**settings_of(site, contexts), "momentum": site.momentum}
        layer = ContextNorm(**settings, shrink=options.shrink, affine=options.affine)
        layer.set_affine(*affine_tensors(source, site))
        layer.take_running(source)
        return layer

    def statistics(self, layer: nn.Module) -> Moments | None:
        """Return the running statistics."""
        if not isinstance(layer, ContextNorm):
            return None
        return Moments(layer.running_mean, layer.running_var)
