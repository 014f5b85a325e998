"""CNSN: CrossNorm, then SelfNorm."""

from dataclasses import dataclass

from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.functional.schedule import Schedule
from normswap.methods.base import InsertedMethod, register_method
from normswap.methods.crossnorm import CrossNormOptions
from normswap.methods.selfnorm import SelfNorm, SelfNormOptions
from normswap.sites import Place
from normswap.util.arguments import describe


class CNSN(nn.Module):
    """CrossNorm, then SelfNorm, at one place.

    ``y = SelfNorm(CrossNorm(x))``; in eval, ``y = SelfNorm(x)``.

    Args:
        crossnorm: a `CrossNorm`; widens the training distribution, has no parameters.
        selfnorm: a `SelfNorm`; bridges training and test distribution, has all the parameters.

    Shape:
        x: (N, C, *), any number of trailing dimensions including none; result: as x.

    Source: Tang et al., ICCV 2021, arXiv 2102.02811, section 5, code ``CNSN``.
    """

    def __init__(self, crossnorm: nn.Module, selfnorm: nn.Module) -> None:
        super().__init__()
        for name, module in (("crossnorm", crossnorm), ("selfnorm", selfnorm)):
            if not isinstance(module, nn.Module):
                raise ConversionError(f"expected {name}= as a module, got {describe(module)}")
        self.crossnorm, self.selfnorm = crossnorm, selfnorm

    def forward(self, x: Tensor, fire: bool | Tensor | None = None) -> Tensor:
        """Exchange styles where CrossNorm fires, then recalibrate.

        Args:
            x: input, (N, C, *).
            fire: for CrossNorm; see `CrossNorm.forward`.

        Returns:
            A tensor of the shape, dtype and memory format of x.
        """
        y: Tensor = self.selfnorm(self.crossnorm(x, fire))
        return y


@dataclass(frozen=True)
class CNSNOptions(SelfNormOptions, CrossNormOptions):
    """Options of the method "cnsn": those of CrossNorm and of SelfNorm.

    Attributes:
        crop, instances, beta, p, active: see `CrossNormOptions`.
        gates, init: see `SelfNormOptions`.
        crossnorm_at: another placement for CrossNorm than SelfNorm's, which is then ``placement``:
            the authors have "input" for ImageNet, and "post" with SelfNorm at "residual" for GTA5.
            Both at one place by default.

    Raises:
        ConversionError: a number out of range, or `crossnorm_at` is no name.
        UnknownNameError: a name that is none of the choices.
    """

    crossnorm_at: str = ""

    def __post_init__(self) -> None:
        CrossNormOptions.__post_init__(self)
        SelfNormOptions.__post_init__(self)
        if not isinstance(self.crossnorm_at, str):
            raise ConversionError(
                f"expected crossnorm_at= as a placement, got {describe(self.crossnorm_at)}"
            )


@register_method
class CNSNMethod(InsertedMethod):
    """CrossNorm, then SelfNorm, at places of a model."""

    name = "cnsn"
    title = "CrossNorm, then SelfNorm: augments in training, recalibrates always"
    options = CNSNOptions
    input_dependent = True
    stochastic = True
    scheduled = True

    def placements(self, placement: str, options: CNSNOptions) -> tuple[str, ...]:
        """Add CrossNorm's where it has its own.

        Raises:
            ConversionError: it is SelfNorm's.
        """
        if options.crossnorm_at == placement:
            raise ConversionError(
                f"expected crossnorm_at= to be another place than SelfNorm's, got {placement!r} "
                'for both; crossnorm_at="" has both there'
            )
        return (options.crossnorm_at, placement) if options.crossnorm_at else (placement,)

    def insert(self, place: Place, options: CNSNOptions) -> nn.Module:
        """Return both, or the one that belongs at the place."""
        if not options.crossnorm_at:
            return CNSN(options.crossnorm(), options.selfnorm(place))
        own = place.placement == options.crossnorm_at
        return options.crossnorm() if own else options.selfnorm(place)

    def connect(self, layers: list[nn.Module], options: CNSNOptions) -> Schedule:
        """Share one schedule between the CrossNorm layers."""
        return options.connect(layers)

    def effect(self, layer: nn.Module) -> str | None:
        """Return what a trained SelfNorm does; CrossNorm is the identity in eval."""
        effects = (m.effect() for m in layer.modules() if isinstance(m, SelfNorm))
        return next((effect for effect in effects if effect is not None), None)
