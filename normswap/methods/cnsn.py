"""CNSN: CrossNorm, then SelfNorm."""

from torch import Tensor, nn


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
        self.crossnorm = crossnorm
        self.selfnorm = selfnorm

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
