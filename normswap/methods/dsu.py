"""DSU: in training, mean and spread of instances are drawn anew, as far apart as the batch is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normswap.functional.affine import Affine
from normswap.functional.moments import Moments, compute_dtype
from normswap.functional.stat_maps import stat_affine
from normswap.functional.style import style_of
from normswap.methods.augmentation import Augmentation, AugmentationMethod, AugmentationOptions
from normswap.methods.registry import register_method


class DSU(Augmentation):
    """Uncertainty of feature statistics; identity in eval, no parameters and no state.

    ``y = (x - mu) / sigma * (sigma + e_2 S(sigma)) + mu + e_1 S(mu)`` with ``sigma = sqrt(var +
    eps)`` of each instance and channel, ``S(v) = sqrt(var_N(v) + eps)`` over the instances of the
    batch, both variances unbiased, and e ~ N(0, 1) for each instance and channel. Gradients go
    through all of them.

    Args:
        p: in [0, 1]; probability that a batch is changed.
        eps: added to the variances.

    Shape:
        x: (N, C, *), at least one trailing dimension; result: as x.

    Raises:
        ConversionError: `p` or `eps` out of range.

    Source: Li et al., "Uncertainty Modeling for Out-of-Distribution Generalization", ICLR 2022,
    arXiv 2202.03958, and the code published with it.
    Differs from source: every draw is torch's, on the device of x; a batch of one, and maps of one
    position, are left alone (NaN in the source); any number of spatial dimensions; statistics
    accumulate in float32.
    """

    eps: float

    def __init__(self, p: float = 0.5, eps: float = 1e-6) -> None:
        super().__init__(DSUOptions(p, eps))

    def augment(self, x: Tensor) -> Tensor:
        """Give each instance statistics drawn about its own; see the class."""
        positions = x.shape[2:].numel()
        noise = torch.randn((2, *x.shape[:2]), device=x.device, dtype=compute_dtype(x))

        def glue(instances: Moments, *_: Tensor, replay: bool) -> Affine:
            mean, std = style_of(instances, positions, self.eps)
            spread_mean, spread_std = (torch.sqrt(t.var(0) + self.eps) for t in (mean, std))
            return Affine(1 + noise[1] * spread_std / std, mean + noise[0] * spread_mean)

        return stat_affine(x, glue)


@dataclass(frozen=True)
class DSUOptions(AugmentationOptions):
    """Options of the method "dsu", by the names of the arguments of `DSU`."""

    eps: float = 1e-6


@register_method
class DSUMethod(AugmentationMethod):
    """DSU at places of a model.

    The authors have it after the first convolution, the pooling that follows, and every stage:
    ``normswap.convert(model, "dsu", placement="output", select=["conv1", "maxpool", "layer?"])``.
    """

    name = "dsu"
    title = "draws channel statistics anew in training, as far apart as the batch's"
    options, layer = DSUOptions, DSU
