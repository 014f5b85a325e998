"""Images of classes for a GAN, a part of them held out, and the judge of what it generates."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import folders, gan
from .data import stratified_mask
from .digits import draw
from .errors import RecipeError
from .frechet import Judge, frechet_distance, imagenet_judge, small_judge

DIGITS_HELD_OUT, FOLDER_HELD_OUT = 0.3, 0.2
GENERATED = 1000
SMOKE_IMAGES = 256


@dataclass(frozen=True)
class Images:
    """Training images, and what judges generated ones.

    Attributes:
        images: (N, C, 32, 32) in [-1, 1].
        labels: (N,).
        classes: their names.
        judge: made from the training images alone.
        held_out: (M, D), features of images that nothing was trained on.
        asked: labels that generated images are asked for: those of random training images.
        real: the figures of these training images themselves.
        note: a line for the report.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    judge: Judge
    held_out: Tensor
    asked: Tensor
    real: dict[str, float]
    note: str


def load(root: Path | None, smoke: bool, device: torch.device) -> Images:
    """Load the images, hold some out and make the judge: the same for every training."""
    images, labels, classes = load_digits() if root is None else load_folder(root)
    generator = torch.Generator().manual_seed(0)
    if smoke and len(images) > SMOKE_IMAGES:
        kept = stratified_mask(labels, SMOKE_IMAGES / len(images), generator)
        images, labels = images[kept], labels[kept]
    share = DIGITS_HELD_OUT if root is None else FOLDER_HELD_OUT
    test = stratified_mask(labels, share, generator)
    others, truth = images[test], labels[test]
    images, labels = images[~test], labels[~test]
    if len(images) < gan.BATCH:
        raise RecipeError(
            f"expected {gan.BATCH} images or more to train on, a batch, got {len(images)}"
        )
    make_judge = small_judge if root is None else imagenet_judge
    judge = make_judge(images, labels, len(classes), device)
    held_out = judge.features(others)
    shown = torch.randperm(len(images), generator=generator)[:GENERATED]
    copied, asked = judge.features(images[shown]), labels[shown]
    distance, accuracy = frechet_distance(held_out, copied), judge.accuracy(copied, asked)
    real = {"distance": distance, "accuracy": accuracy}
    note = (
        f"{len(images):,} training images of {len(classes)} classes, {len(others)} held out; "
        f"judge: {judge.name}, {judge.accuracy(held_out, truth):.1f} % right on held-out images"
    )
    return Images(images, labels, classes, judge, held_out, asked, real, note)


def load_digits() -> tuple[Tensor, Tensor, list[str]]:
    """Give scikit-learn's digits at 32 px in [-1, 1], their labels, the names of the classes."""
    from sklearn.datasets import load_digits as sklearn_digits

    source = sklearn_digits()
    pixels = torch.tensor(source.images, dtype=torch.float32)
    classes = [str(digit) for digit in source.target_names]
    return draw(pixels, gan.SIZE) * 2 - 1, torch.tensor(source.target), classes


def load_folder(root: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Give the images of a folder CLASS/image likewise, cropped to squares."""
    data = folders.load_folder(root, gan.SIZE, flat=True)
    if data.domain_names != [root.resolve().name]:
        raise RecipeError(
            f"expected images as CLASS/image in {root}; of a folder DOMAIN/CLASS/image, give one "
            f"domain, such as --data {root / data.domain_names[0]}"
        )
    if len(data.classes) < 2:
        raise RecipeError(f"expected two folders of classes or more in {root}, got {data.classes}")
    return data.images.float() / 127.5 - 1, data.labels, data.classes
