"""Random versions of images that a generator alone decides: windows of them, and timm's changes."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random window of a square image: its side, how far its centre may move, and mirroring.

    All are fractions of the image. A window beyond the image shows its edge drawn out.
    """

    side: tuple[float, float]
    shift: float
    flip: bool


def draw_windows(n: int, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw a window for each of n images: an affine map of coordinates, (n, 2, 3)."""
    uniform = torch.rand(n, 4, generator=generator)
    low, high = how.side
    side = low + (high - low) * uniform[:, 0]
    # A window smaller than the image may sit anywhere inside it, and `shift` beyond that.
    reach = (1 - side).clamp(min=0) + how.shift
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where((uniform[:, 3] < 0.5) & how.flip, -side, side)
    theta[:, 1, 1] = side
    theta[:, :, 2] = (2 * uniform[:, 1:3] - 1) * reach[:, None]
    return theta


def cut_windows(
    images: Tensor, windows: Tensor, mode: str = "bilinear", beyond: str = "border"
) -> Tensor:
    """Cut a window out of each image (N, C, S, S) and resize it back to the image's size."""
    grid = F.affine_grid(windows, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, mode, beyond, align_corners=False)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed the generators of Python and NumPy, which timm draws from, and put them back."""
    before, before_numpy = random.getstate(), np.random.get_state()
    seed = int(torch.randint(2**32, (), generator=generator))
    try:
        random.seed(seed)
        np.random.seed(seed)
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def each(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change (N, 3, S, S) uint8 images one by one, as PIL's."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    changed = np.stack([np.asarray(change(picture)) for picture in pictures])
    return torch.from_numpy(changed).permute(0, 3, 1, 2)


def colour(mean: Sequence[float]) -> tuple[int, ...]:
    """Give a mean in [0, 1] as timm's transforms take the colour of what they uncover."""
    return tuple(min(255, round(255 * value)) for value in mean)


class AugMix:
    """timm's AugMix at the authors' severity 3 and width 3, on uint8 tensors."""

    def __init__(self, mean: tuple[float, ...], without: Sequence[str] = ()) -> None:
        self._transform = augment_and_mix_transform("augmix-m3-w3", {"img_mean": colour(mean)})
        names = [op.name for op in self._transform.ops]
        if unknown := sorted(set(without) - set(names)):
            raise ValueError(f"expected operations of {', '.join(names)}, got {unknown}")
        self._transform.ops = [op for op in self._transform.ops if op.name not in without]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Mix each of (N, 3, S, S) uint8 images with augmented versions of itself."""
        with seeded(generator):
            return each(images, self._transform)
