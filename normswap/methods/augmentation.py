"""What augmentations of features share: they act in training, on a whole batch or not at all."""

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normswap.methods.base import InsertedMethod
from normswap.methods.layer_tensors import check_input
from normswap.sites import Place
from normswap.util.arguments import check_choice, check_number

MIXES = ("random", "crossdomain")


@dataclass(frozen=True)
class AugmentationOptions:
    """Base of the options of a method that adds augmentations.

    Attributes:
        p: probability that a batch is changed, in [0, 1].

    Raises:
        ConversionError: a number out of range; those besides p are positive.
        UnknownNameError: another mix.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "mix":
                check_choice("mix", value, MIXES)
            else:
                check_number(name, value, 0, 1 if name == "p" else math.inf, open_low=name != "p")


class Augmentation(nn.Module):
    """Base of layers that change features with probability p in training; identity in eval.

    A subclass implements `augment`. Whether it fires is drawn on the device of x, for the whole
    batch: the host waits for nothing, and one graph serves `torch.compile`.

    Args:
        options: p in [0, 1], and what else a subclass takes; they become attributes.
    """

    p: float

    def __init__(self, options: AugmentationOptions) -> None:
        super().__init__()
        self.settings = asdict(options)
        self.__dict__.update(self.settings)

    def forward(self, x: Tensor) -> Tensor:
        """Augment x, (N, C, *).

        Returns:
            A tensor of the shape, dtype and memory format of x; x itself in eval, with fewer than
            two samples, and with a single position.

        Raises:
            InputError: fewer than two dimensions, or integers.
        """
        check_input(x, type(self).__name__)
        if not self.training or x.shape[0] < 2 or x.shape[2:].numel() < 2:
            return x
        fires = torch.rand((), device=x.device) < self.p
        return torch.where(fires, self.augment(x), x)

    @abstractmethod
    def augment(self, x: Tensor) -> Tensor:
        """Return x changed: at least two samples of at least two positions each."""

    def extra_repr(self) -> str:
        """List the settings."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)


class AugmentationMethod(InsertedMethod):
    """Base of methods that add augmentations.

    Attributes:
        layer: class of the layers; it takes the options by name, and no channels.
    """

    layer: ClassVar[type[Augmentation]]
    stochastic = True

    def insert(self, place: Place, options: AugmentationOptions) -> nn.Module:
        """Return a layer; it needs no channels."""
        return self.layer(**asdict(options))
