"""Pseudo-labels: a model's predictions on weakly changed images teach it strongly changed ones.

    p = softmax(f(weak(u)));  loss = mean_i [max p_i >= threshold] * H(target_i, f(strong(u_i)))

Weak is a window of the image (shift, crop, flip: the data set's own augmentation); strong is timm's
RandAugment, another such window, and a rectangle erased.

Source: Sohn et al., "FixMatch", NeurIPS 2020, arXiv 2001.07685: one-hot targets, a fixed threshold.
Berthelot et al., "AdaMatch", ICLR 2022, arXiv 2106.04732: targets aligned with the distribution of
classes on the source, kept as they are, and a threshold relative to the confidence there.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .augment import colour, each, seeded
from .data import Loader

RAND_AUGMENT = "rand-m10-n2"


class Views:
    """Weak and strong versions of a data set's images, ready for a model."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._augment = rand_augment_transform(RAND_AUGMENT, {"img_mean": colour(loader.mean)})
        self._erase = RandomErasing(probability=1.0, max_area=0.25, device=str(loader.device))

    def weak(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Give a random window of each of these images."""
        return self.loader.batch(indices, generator).images

    def strong(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Give strongly changed versions of these images; the generator alone decides them."""
        with seeded(generator):
            changed = each(self.loader.data.images[indices], self._augment)
            # After normalisation, so that what is erased is the mean colour.
            return self._erase(self.loader.normalised(changed, generator))


def draw(indices: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw the batches of a whole training: passes over `indices`, shuffled anew each time."""
    passes = math.ceil(steps * size / len(indices))
    order = [indices[torch.randperm(len(indices), generator=generator)] for _ in range(passes)]
    return torch.cat(order)[: steps * size].view(steps, size)


@dataclass(frozen=True)
class Pseudo:
    """The loss on strong views, and for the record which samples it took and what for.

    Shape: loss (); kept (N,) bool; labels (N,) int64.
    """

    loss: Tensor
    kept: Tensor
    labels: Tensor


def pseudo_loss(
    targets: Tensor, strong: Tensor, threshold: float | Tensor, one_hot: bool
) -> Pseudo:
    """Teach logits of strong views the confident ones among probabilities from weak views.

    With `one_hot` they learn the likeliest class, else the probabilities.
    """
    targets = targets.detach()
    confidence, labels = targets.max(1)
    kept = confidence >= threshold
    each = F.cross_entropy(strong, labels if one_hot else targets, reduction="none")
    return Pseudo((each * kept).mean(), kept, labels)


class Alignment:
    """Distribution alignment: target predictions reweighed to the source's share of classes.

    ``normalise(p * E[p_source] / E[p_target])``, expectations as running averages over batches (a
    batch of some thirty images is too few to know the share of each of ten classes).
    """

    def __init__(self, classes: int, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.source = torch.full((classes,), 1 / classes)
        self.target = torch.full((classes,), 1 / classes)

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """Note the mean of both (N, classes) probabilities; give those of the target, aligned."""
        self.source = self.source.to(source).lerp(source.detach().mean(0), self.momentum)
        self.target = self.target.to(target).lerp(target.detach().mean(0), self.momentum)
        weighed = target * (self.source / self.target.clamp(min=1e-6))
        return weighed / weighed.sum(1, keepdim=True)
