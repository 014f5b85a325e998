"""MixStyle: in training, instances take on mixtures of each other's mean and spread."""

from dataclasses import dataclass

from torch import Tensor

from normswap.functional.affine import Centred
from normswap.functional.draws import draw_beta, draw_partners
from normswap.functional.style import instance_style
from normswap.functional.tables import apply_centred
from normswap.methods.augmentation import Augmentation, AugmentationMethod, AugmentationOptions
from normswap.methods.registry import register_method


class MixStyle(Augmentation):
    """MixStyle: an augmentation of features; identity in eval, no parameters and no state.

    ``y = (x - mu) / sigma * sigma' + mu'`` with ``mu' = l mu + (1 - l) mu_B``, sigma' likewise,
    ``sigma = sqrt(var + eps)``, var unbiased, of each instance and channel; B is a partner in the
    batch, l ~ Beta(alpha, alpha) one for each instance. No gradient goes through mu and sigma.

    Args:
        p: in [0, 1]; probability that a batch is changed.
        alpha: positive; below 1 most l are near 0 or 1.
        mix: "random", where B is any instance; or "crossdomain", one of the other half of the
            batch: its halves then have to be of two domains, as the authors' sampler makes them.
        eps: added to the variance.

    Shape:
        x: (N, C, *), at least one trailing dimension; result: as x.

    Raises:
        ConversionError: `p`, `alpha` or `eps` out of range.
        UnknownNameError: `mix` is neither of the two.

    Source: Zhou et al., "Domain Generalization with MixStyle", ICLR 2021, and the code published
    with it (also in Dassl and tllib).
    Differs from source: every draw is torch's, on the device of x; maps of one position are left
    alone (NaN in the source), as is a batch of one; any number of spatial dimensions; statistics
    accumulate in float32.
    """

    alpha: float
    mix: str
    eps: float

    def __init__(
        self, p: float = 0.5, alpha: float = 0.1, mix: str = "random", eps: float = 1e-6
    ) -> None:
        super().__init__(MixStyleOptions(p, alpha, mix, eps))

    def augment(self, x: Tensor) -> Tensor:
        """Give each instance its mixture; see the class."""
        mean, std = instance_style(x.detach(), eps=self.eps)
        share = draw_beta(self.alpha, x.shape[0], x.device).to(mean.dtype).unsqueeze(1)
        partners = draw_partners(x.shape[0], self.mix, x.device)
        new_mean, new_std = (t[partners].lerp(t, share) for t in (mean, std))
        return apply_centred(x, Centred(mean, new_std / std, new_mean))


@dataclass(frozen=True)
class MixStyleOptions(AugmentationOptions):
    """Options of the method "mixstyle", by the names of the arguments of `MixStyle`."""

    alpha: float = 0.1
    mix: str = "random"
    eps: float = 1e-6


@register_method
class MixStyleMethod(AugmentationMethod):
    """MixStyle at places of a model.

    The authors have it after the first stages of a ResNet:
    ``normswap.convert(model, "mixstyle", placement="output", select=["layer1", "layer2"])``.
    """

    name = "mixstyle"
    title = "mixes channel statistics between samples in training: an augmentation"
    options, layer = MixStyleOptions, MixStyle
