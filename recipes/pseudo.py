"""Pseudo-labels: a model's predictions on weakly changed images teach it strongly changed ones.

    p = softmax(f(weak(u)));  loss = mean_i [max p_i >= threshold] * H(target_i, f(strong(u_i)))

Weak is a window of the image (shift, crop, flip: the data set's own augmentation); strong is timm's
RandAugment, another such window, and a rectangle erased.

Source: Sohn et al., "FixMatch", NeurIPS 2020, arXiv 2001.07685: one-hot targets, a fixed threshold.
Berthelot et al., "AdaMatch", ICLR 2022, arXiv 2106.04732: targets aligned with the distribution of
classes on the source, kept as they are, and a threshold relative to the confidence there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .data import DomainData, cut_windows, draw_windows
from .losses import seeded

RAND_AUGMENT = "rand-m10-n2"


class Views:
    """Weak and strong versions of a data set's images, float and normalised, on the device.

    Args:
        data: the images.
        mean: per channel, of pixel values in [0, 1].
        std: likewise.
        device: where the views go.
    """

    def __init__(
        self,
        data: DomainData,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ) -> None:
        self.data = data
        self.device = device
        fill = tuple(min(255, round(255 * value)) for value in mean)
        self._augment = rand_augment_transform(RAND_AUGMENT, {"img_mean": fill})
        self._erase = RandomErasing(probability=1.0, max_area=0.25, device=str(device))
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]

    def plain(self, indices: Tensor) -> Tensor:
        """Give these images as they are, as a test sees them."""
        return self._normalised(self.data.images[indices])

    def weak(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Give a random window of each of these images."""
        return self._normalised(self.data.images[indices], generator)

    def strong(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Give strongly changed versions of these images; the generator alone decides them."""
        with seeded(int(torch.randint(2**32, (), generator=generator))):
            changed = torch.stack([self._change(image) for image in self.data.images[indices]])
            # After normalisation, so that what is erased is the mean colour.
            return self._erase(self._normalised(changed, generator))

    def _change(self, image: Tensor) -> Tensor:
        changed = self._augment(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)

    def _normalised(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        images = images.to(self.device).float() / 255
        if generator is not None:
            windows = draw_windows(len(images), self.data.augmentation, generator)
            images = cut_windows(images, windows)
        return (images - self._mean) / self._std


def draw(indices: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw the batches of a whole training: passes over `indices`, shuffled anew each time.

    Args:
        indices: (N,) samples to draw from, fewer than a batch or more.
        size: samples a batch.
        steps: batches.
        generator: decides the order.

    Returns:
        (steps, size), rows are batches.
    """
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
    """Teach predictions on strong views the confident ones among those on weak views.

    Args:
        targets: (N, classes) probabilities from weak views; no gradient flows through them.
        strong: (N, classes) logits of the strong views of the same images.
        threshold: confidence from which on a sample counts.
        one_hot: take the likeliest class instead of the probabilities.
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

    Args:
        classes: how many.
        momentum: weight of the newest batch.
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
