"""EFDMix: in training, instances take on mixtures of each other's sorted values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normswap.functional.draws import draw_beta, draw_partners
from normswap.functional.moments import compute_dtype
from normswap.methods.augmentation import Augmentation, AugmentationMethod, AugmentationOptions
from normswap.methods.registry import register_method


class EFDMix(Augmentation):
    """Exact feature distribution mixing; identity in eval, no parameters and no state.

    In each channel the i-th smallest value of an instance moves towards the i-th smallest of its
    partner B: ``y = x + (1 - l) (match - x.detach())`` where `match` holds B's values in the order
    that x's have; l ~ Beta(alpha, alpha), one for each instance. With l = 0 the histogram is
    exactly B's. Gradients reach x as through the identity, and B through its values.

    Args:
        p: in [0, 1]; probability that a batch is changed.
        alpha: positive; below 1 most l are near 0 or 1.
        mix: "random", where B is any instance; or "crossdomain", one of the other half of the
            batch: its halves then have to be of two domains, as the authors' sampler makes them.

    Shape:
        x: (N, C, *), at least one trailing dimension; result: as x.

    Raises:
        ConversionError: `p` or `alpha` out of range.
        UnknownNameError: `mix` is neither of the two.

    Source: Zhang et al., "Exact Feature Distribution Matching for Arbitrary Style Transfer and
    Domain Generalization", CVPR 2022, and the code published with it, which lets gradients reach B
    where the paper's formula stops them.
    Differs from source: one sort in place of two; every draw is torch's, on the device of x; any
    number of spatial dimensions; no eps, which the source never uses.
    """

    alpha: float
    mix: str

    def __init__(self, p: float = 0.5, alpha: float = 0.1, mix: str = "random") -> None:
        super().__init__(EFDMixOptions(p, alpha, mix))

    def augment(self, x: Tensor) -> Tensor:
        """Move each instance's values towards its partner's; see the class."""
        # Equal values keep their order, so that all devices do the same.
        values, order = x.flatten(2).sort(stable=True, dim=-1)
        partners = draw_partners(x.shape[0], self.mix, x.device)
        match = torch.zeros_like(values).scatter(-1, order, values[partners]).view(x.shape)
        wide = compute_dtype(x)
        share = draw_beta(self.alpha, x.shape[0], x.device).to(wide)
        share = share.reshape(-1, *(1,) * (x.dim() - 1))
        move = (1 - share) * (match.to(wide) - x.detach().to(wide))
        return x + move.to(x.dtype)


@dataclass(frozen=True)
class EFDMixOptions(AugmentationOptions):
    """Options of the method "efdmix", by the names of the arguments of `EFDMix`."""

    alpha: float = 0.1
    mix: str = "random"


@register_method
class EFDMixMethod(AugmentationMethod):
    """EFDMix at places of a model.

    The authors have it after the first stages of a ResNet:
    ``normswap.convert(model, "efdmix", placement="output", select=["layer1", "layer2"])``.
    """

    name = "efdmix"
    title = "mixes the sorted values of samples in training: an augmentation"
    options, layer = EFDMixOptions, EFDMix
