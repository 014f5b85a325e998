"""Images that stay on the device whole, and epochs of them that are made there.

A batch costs no more than a slice: an epoch's images are shifted and mirrored at once, as uint8, by
what seed and epoch draw on the CPU, so that all devices see the same. 50,000 images of 32 px take
150 MB, an epoch as much again.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augmentation
from .data import DomainData

PADDING = 4


@lru_cache(maxsize=1)
def load(path: Path, device: torch.device) -> DomainData:
    """Load the images once a process, (N, H, W, 3) uint8 on the device."""
    how = Augmentation(side=(1.0, 1.0), shift=PADDING, flip=True)
    data = DomainData(**torch.load(path, weights_only=True), augmentation=how)
    return replace(data, images=data.images.to(device).permute(0, 2, 3, 1).contiguous())


def ready(pixels: Tensor) -> Tensor:
    """Make uint8 (N, H, W, 3) ready for the network: (N, 3, H, W), channels last."""
    return pixels.permute(0, 3, 1, 2).float().sub(127.5).div(63.75)


def epoch_of(
    data: DomainData, chosen: Tensor, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give batches of images, labels and contexts; seed and epoch alone decide them.

    All images of the epoch are shifted and mirrored at once, on their device, as uint8.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    device, size = data.images.device, data.images.shape[1]
    whole = len(chosen) - len(chosen) % min(batch_size, len(chosen))
    order = chosen[torch.randperm(len(chosen), generator=generator)[:whole]].to(device)
    shifts = torch.randint(2 * PADDING + 1, (2, whole, 1), generator=generator).to(device)
    mirrored = torch.rand(whole, 1, generator=generator).to(device) < 0.5
    line = torch.arange(size, device=device)
    rows, columns = shifts[0] + line, shifts[1] + torch.where(mirrored, line.flip(0), line)
    padded = F.pad(data.images, (0, 0, *(PADDING,) * 4))
    pixels = padded[order[:, None, None], rows[:, :, None], columns[:, None, :]]
    for index, part in zip(order.split(batch_size), pixels.split(batch_size), strict=True):
        yield ready(part), data.labels[index], data.domains[index]
