"""Segmentation data of several domains in memory: made on the spot, or read from a folder.

The made ones are scikit-learn's handwritten digits on scikit-image's photographs of textures (those
that its wheel ships), every pixel labelled with the digit whose ink it shows, or as background.
Domains differ in texture, colour, ink, light and noise. Their looks were picked by what plain
BatchNorm scores on the targets, so that it loses much there and not everything; no other method was
tried on them meanwhile. Training, validation and test scenes show different
digits, and test scenes another part of the photograph: nothing of theirs is trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import digits
from .augment import Augmentation, cut_windows, draw_windows
from .data import stratified_mask
from .errors import check, check_names

IGNORED = 255
TRAIN, VALID, TEST = range(3)
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Scenes:
    """Images with a class for every pixel.

    `domains` numbers the sources from 0 on, then the targets; `parts` says what each scene is for
    (TRAIN, VALID or TEST). Targets only test.

    Shape: images (N, 3, S, S) uint8; masks (N, S, S) uint8, 255 where no class is known; domains
    and parts (N,) int64.
    """

    images: Tensor
    masks: Tensor
    domains: Tensor
    parts: Tensor
    sources: list[str]
    targets: list[str]
    classes: int
    augmentation: Augmentation

    def where(self, part: int, domain: int | None = None) -> Tensor:
        chosen = self.parts == part
        return (chosen if domain is None else chosen & (self.domains == domain)).nonzero()[:, 0]

    def batches(
        self, indices: Tensor, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give batches of float images in [0, 1], int64 masks, and domains.

        With a generator they are shuffled and cut at random, and a short last batch is left out
        (BatchNorm's statistics would be worse on it); without one, all and as they are.
        """
        if generator is not None:
            indices = indices[torch.randperm(len(indices), generator=generator)]
            indices = indices[: max(len(indices) // size, 1) * size]
        for chosen in indices.split(size):
            images, masks = self.images[chosen].float() / 255, self.masks[chosen].long()
            if generator is not None:
                windows = draw_windows(len(chosen), self.augmentation, generator)
                images, masks = cut(images, masks, windows)
            yield images, masks, self.domains[chosen]


def cut(images: Tensor, masks: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a window out of each image and its mask; what lies beyond the edge is ignored."""
    # What is beyond the edge comes back as 0: classes are counted from 1 on meanwhile.
    shifted = torch.where(masks == IGNORED, 0, masks + 1).float()[:, None]
    shifted = cut_windows(shifted, windows, "nearest", "zeros")[:, 0].long()
    return cut_windows(images, windows), torch.where(shifted == 0, IGNORED, shifted - 1)


class Look(NamedTuple):
    """What a made domain looks like: a texture of `skimage.data`, and ink on it.

    `tint` is a factor of each colour, `opacity` how much of the texture the ink hides; the `light`
    of a scene lies between two factors, and `noise` is the deviation of pixel values in [0, 1].
    """

    texture: str
    tint: Colour
    ink: Colour
    opacity: float
    light: tuple[float, float]
    noise: float


LOOKS = {
    "gravel": Look("gravel", (0.95, 0.95, 1.0), (1.0, 1.0, 1.0), 0.9, (0.7, 1.1), 0.03),
    "grass": Look("grass", (0.9, 1.0, 0.85), (0.0, 0.0, 0.1), 0.9, (1.1, 1.5), 0.03),
    "brick": Look("brick", (1.0, 0.9, 0.85), (1.0, 1.0, 1.0), 0.8, (0.6, 0.9), 0.05),
    "moon": Look("moon", (1.0, 1.0, 1.0), (0.0, 0.0, 0.1), 0.8, (0.6, 0.9), 0.05),
    "fur": Look("chelsea", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0.8, (0.9, 1.1), 0.03),
}
# Scenes a domain: of a source for training, validation and test; of a target for test.
COUNTS = (500, 100, 200)
DIGITS_A_SCENE = 3


def make_scenes(
    sources: Sequence[str], targets: Sequence[str], size: int = 64, seed: int = 0,
    counts: tuple[int, int, int] = COUNTS,
) -> Scenes:  # fmt: skip
    check_names("domains among", (*sources, *targets), LOOKS)
    check(size >= 32, f"expected --image-size of at least 32 for the digits, got {size}")
    pixels, labels, classes = digits.source()
    generator = torch.Generator().manual_seed(seed)
    # Of the digits a quarter tests, an eighth validates, the others train.
    test = stratified_mask(labels, 0.25, generator)
    valid = stratified_mask(torch.where(test, 10, labels), 1 / 6, generator) & ~test
    use = torch.where(test, TEST, torch.where(valid, VALID, TRAIN))
    made: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for domain, name in enumerate((*sources, *targets)):
        texture = photograph(LOOKS[name])
        # The right third of each photograph is kept for test scenes.
        left = 2 * texture.shape[2] // 3
        for part in (TRAIN, VALID, TEST) if domain < len(sources) else (TEST,):
            chosen = (use == part).nonzero()[:, 0]
            ground = texture[:, :, left:] if part == TEST else texture[:, :, :left]
            for _ in range(counts[part]):
                at = chosen[torch.randint(len(chosen), (DIGITS_A_SCENE,), generator=generator)]
                shown = pixels[at] / 16, labels[at]
                scene = draw_scene(*shown, ground, LOOKS[name], size, generator)
                made.append((*scene, torch.tensor(domain), torch.tensor(part)))
    # No mirroring: a mirrored digit is another sign.
    how = Augmentation(side=(0.85, 1.15), shift=0.05, flip=False)
    stacked = map(torch.stack, zip(*made, strict=True))
    return Scenes(*stacked, list(sources), list(targets), 1 + len(classes), how)


def photograph(look: Look) -> Tensor:
    """Give the tinted texture of a look, (3, H, W) float in [0, 1]."""
    import skimage.data

    image = np.asarray(getattr(skimage.data, look.texture)(), dtype=np.float32) / 255
    return torch.from_numpy(np.atleast_3d(image) * np.float32(look.tint)).permute(2, 0, 1)


def draw_scene(
    digits: Tensor, labels: Tensor, ground: Tensor, look: Look, size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw digits on a piece of a texture, each in a quarter of its own.

    Of the ground (3, H, W), a piece of twice the size is halved. Digits are (D, 8, 8) in [0, 1], at
    most four, and labels (D,) below 10.

    Shape: image (3, size, size) uint8; mask (size, size) uint8: 0, or 1 + the digit.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = min(2 * size, *ground.shape[1:])
    top, left = (draw(0, extent - side) for extent in ground.shape[1:])
    piece = ground[None, :, top : top + side, left : left + side]
    image = F.interpolate(piece, size=(size, size), mode="area")[0]
    ink = torch.zeros(size, size)
    mask = torch.zeros(size, size, dtype=torch.uint8)
    cell = size // 2
    quarters = torch.randperm(4, generator=generator)[: len(digits)].tolist()
    for digit, label, quarter in zip(digits, labels.tolist(), quarters, strict=True):
        tall = draw(round(0.65 * cell), round(0.95 * cell))
        large = F.interpolate(digit[None, None], size=(tall, tall), mode="bicubic")[0, 0]
        y = quarter // 2 * cell + draw(0, cell - tall)
        x = quarter % 2 * cell + draw(0, cell - tall)
        ink[y : y + tall, x : x + tall] = large.clamp(0, 1)
        mask[y : y + tall, x : x + tall][large > 0.5] = 1 + label
    low, high = look.light
    light = low + (high - low) * torch.rand((), generator=generator)
    share = look.opacity * ink
    image = light * (image * (1 - share) + torch.tensor(look.ink)[:, None, None] * share)
    image = image + look.noise * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), mask
