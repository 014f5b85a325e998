"""scikit-learn's handwritten digits as rotated domains, in the manner of Rotated MNIST.

Each training digit is shown at one angle only, as domain generalisation uses Rotated MNIST (Ghifary
et al. 2015, Gulrajani and Lopez-Paz 2021). Each test digit is shown at every angle, so that domains
are compared on the same digits; no test digit is ever trained on, at any angle.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augmentation, cut_windows
from .data import DomainData, stratified_mask
from .errors import check, check_names

ANGLES = (0, 30, 60, 90)
TEST_FRACTION = 0.3


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate images (N, C, S, S) counter-clockwise, bilinear, black outside."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    return cut_windows(images, theta.expand(len(images), 2, 3), beyond="zeros")


def source() -> tuple[Tensor, Tensor, list[str]]:
    """Give the digits (N, 8, 8) float in [0, 16], their labels, the names of the classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)
    return pixels, torch.tensor(found.target, dtype=torch.int64), list(map(str, found.target_names))


def draw(pixels: Tensor, size: int) -> Tensor:
    """Enlarge 8 x 8 digits in [0, 16] to (N, 1, size, size) in [0, 1], with room to turn them."""
    inner = round(size * 0.75)
    before = (size - inner) // 2
    after = size - inner - before
    large = F.interpolate(pixels[:, None] / 16, size=(inner, inner), mode="bicubic").clamp(0, 1)
    return F.pad(large, (before, after, before, after))


def load_digits(
    size: int = 32, seed: int = 0, held_out: str | None = None, limit: int | None = None,
    angles: Sequence[int] | None = None,
) -> DomainData:  # fmt: skip
    """Load the digits, split them, and turn them into one domain an angle."""
    angles = ANGLES if angles is None else angles
    names = [str(angle) for angle in angles]
    if held_out is not None:
        check_names("--held-out to be one of the domains", [held_out], names)
    check(size >= 16, f"expected --image-size of at least 16 for the digits, got {size}")
    pixels, labels, classes = source()
    generator = torch.Generator().manual_seed(seed)
    if limit is not None and limit < len(labels):
        kept = stratified_mask(labels, limit / len(labels), generator)
        pixels, labels = pixels[kept], labels[kept]
    is_test = stratified_mask(labels, TEST_FRACTION, generator)
    trained = [index for index, name in enumerate(names) if name != held_out]
    home = _deal(labels, ~is_test, trained, generator)
    upright = draw(pixels, size)
    parts = []
    for domain, angle in enumerate(angles):
        shown = is_test | (home == domain)
        turned = rotate(upright[shown], angle).clamp(0, 1)
        images = (turned * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        parts.append((images, labels[shown], torch.full((len(images),), domain), is_test[shown]))
    images, labels, domains, test = (torch.cat(part) for part in zip(*parts, strict=True))
    # No mirroring: a mirrored digit is another sign.
    how = Augmentation(side=(0.9, 1.1), shift=0.08, flip=False)
    note = "each training digit at one angle only, each test digit at every angle"
    return DomainData(images, labels, domains, ~test, test, classes, names, how, held_out, note)


def _deal(labels: Tensor, chosen: Tensor, domains: list[int], generator: torch.Generator) -> Tensor:
    """Deal the chosen samples of each class evenly over the domains; -1 for the others."""
    shuffled = chosen.nonzero().flatten()
    shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    home = torch.full_like(labels, -1)
    home[by_class] = torch.tensor(domains)[torch.arange(len(by_class)) % len(domains)]
    return home
