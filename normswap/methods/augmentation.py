"""What augmentations of features share: they act in training, on a whole batch or not at all."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from normswap.errors import InputError
from normswap.util.arguments import check_number

MIXES = ("random", "crossdomain")


class Augmentation(nn.Module):
    """Base of layers that change features with probability p in training; identity in eval.

    A subclass implements `augment`. Whether it fires is drawn on the device of x, for the whole
    batch: the host waits for nothing, and one graph serves `torch.compile`.

    Args:
        p: in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_number("p", p, 0, 1)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Augment x, (N, C, *).

        Returns:
            A tensor of the shape, dtype and memory format of x; x itself in eval, with fewer than
            two samples, and with a single position.

        Raises:
            InputError: fewer than two dimensions.
        """
        if x.dim() < 2:
            raise InputError(
                f"expected input (N, C, *) at {type(self).__name__}, got {tuple(x.shape)}"
            )
        if not self.training or x.shape[0] < 2 or x.shape[2:].numel() < 2:
            return x
        fires = torch.rand((), device=x.device) < self.p
        return torch.where(fires, self.augment(x), x)

    @abstractmethod
    def augment(self, x: Tensor) -> Tensor:
        """Return x changed: at least two samples of at least two positions each."""
