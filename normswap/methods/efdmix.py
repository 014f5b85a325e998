"""EFDMix: in training, instances take on mixtures of each other's sorted values."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from normswap.functional.draws import draw_beta, draw_partners
from normswap.functional.moments import compute_dtype
from normswap.methods.augmentation import MIXES, Augmentation
from normswap.methods.base import InsertedMethod, register_method
from normswap.sites import Place
from normswap.util.arguments import check_choice, check_number


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

    def __init__(self, p: float = 0.5, alpha: float = 0.1, mix: str = "random") -> None:
        super().__init__(p)
        EFDMixOptions(p, alpha, mix)  # raises where a value is wrong
        self.alpha, self.mix = alpha, mix

    def augment(self, x: Tensor) -> Tensor:
        """Move each instance's values towards its partner's; see the class."""
        # Equal values keep their order, so that all devices do the same.
        values, order = x.flatten(2).sort(stable=True, dim=-1)
        partners = draw_partners(len(x), self.mix, x.device)
        match = torch.zeros_like(values).scatter(-1, order, values[partners]).view(x.shape)
        wide = compute_dtype(x)
        share = draw_beta(self.alpha, len(x), x.device).to(wide)
        share = share.reshape(-1, *(1,) * (x.dim() - 1))
        move = (1 - share) * (match.to(wide) - x.detach().to(wide))
        return x + move.to(x.dtype)

    def extra_repr(self) -> str:
        """List the settings."""
        return f"p={self.p}, alpha={self.alpha}, mix={self.mix!r}"


@dataclass(frozen=True)
class EFDMixOptions:
    """Options of the method "efdmix"; see `EFDMix`.

    Attributes:
        p: probability that a batch is changed.
        alpha: of the Beta distribution.
        mix: "random" or "crossdomain".
    """

    p: float = 0.5
    alpha: float = 0.1
    mix: str = "random"

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ConversionError: a number out of range.
            UnknownNameError: another mix.
        """
        check_number("p", self.p, 0, 1)
        check_number("alpha", self.alpha, 0, open_low=True)
        check_choice("mix", self.mix, MIXES)


@register_method
class EFDMixMethod(InsertedMethod):
    """EFDMix at places of a model.

    The authors have it after the first stages of a ResNet:
    ``normswap.convert(model, "efdmix", placement="output", select=["layer1", "layer2"])``.
    """

    name = "efdmix"
    title = "mixes the sorted values of samples in training: an augmentation"
    options = EFDMixOptions
    stochastic = True

    def insert(self, place: Place, options: EFDMixOptions) -> nn.Module:
        """Return a layer; it needs no channels."""
        return EFDMix(**asdict(options))
