"""What the recipes on one set of images share: the images, the network, the training.

The default is scikit-learn's handwritten digits, upright, and a ResNet-10-T from scratch; a folder
DOMAIN/CLASS/image is taken as one set, its domains mixed, and tunes EfficientNet-Lite0 from the
ImageNet weights that a dependency ships. Every method starts from the same weights and sees the
same images in the same order (`recipes.training`); the figures are those of the last epoch, so
nothing is chosen on test images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from . import grid
from .config import DIGITS_MODEL, SCRATCH_LR, TUNE_LR, Config
from .data import DomainData, Loader
from .digits import load_digits
from .errors import RecipeError
from .finetune import check_image_size, check_model_name
from .folders import load_folder
from .losses import AugMix
from .training import fill_statistics, make_arm, train_epoch
from .weights import EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_TIMM, make_backbone

DIGITS_EPOCHS, FOLDER_EPOCHS = 6, 4
DIGITS_SIZE, FOLDER_SIZE = 24, 64
SMOKE_DIGITS, SMOKE_IMAGES_PER_CLASS = 100, 3
SCRATCH = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of images, network and training."""
    option = parser.add_argument
    option("--data", type=Path, help="folder DOMAIN/CLASS/image (default: handwritten digits)")
    option(
        "--images-per-class", type=grid.count, metavar="N",
        help="of each domain, training and test together (default: all)",
    )  # fmt: skip
    option(
        "--train-per-class", type=grid.count, metavar="N",
        help="train on so many of each class, drawn at random (default: all that do not test)",
    )  # fmt: skip
    option(
        "--image-size", type=grid.count,
        help=f"pixels a side (default: {DIGITS_SIZE} for digits, else {FOLDER_SIZE})",
    )  # fmt: skip
    option(
        "--model",
        help=f"any timm model with BatchNorm (default: {DIGITS_MODEL} for digits, else "
        f"{EFFICIENTNET_LITE0_TIMM})",
    )
    option(
        "--weights",
        help=f"a safetensors or torch file, {EFFICIENTNET_LITE0}, or {SCRATCH} (default: "
        f"{EFFICIENTNET_LITE0} for {EFFICIENTNET_LITE0_TIMM}, else {SCRATCH})",
    )
    option(
        "--epochs", type=grid.count,
        help=f"(default: of the recipe for digits, else {FOLDER_EPOCHS})",
    )  # fmt: skip
    option("--batch-size", type=grid.count, default=64, help="(default: 64)")
    option("--lr", type=float, help=f"AdamW's peak (default: {SCRATCH_LR}; tuning {TUNE_LR})")


def resolve(options: argparse.Namespace, digits_epochs: int = DIGITS_EPOCHS) -> None:
    """Decide what was left to the data, so that the record of the run says it; check the model."""
    digits = options.data is None
    options.image_size = options.image_size or (DIGITS_SIZE if digits else FOLDER_SIZE)
    options.model = options.model or (DIGITS_MODEL if digits else EFFICIENTNET_LITE0_TIMM)
    if options.weights is None:
        lite = options.model == EFFICIENTNET_LITE0_TIMM
        options.weights = EFFICIENTNET_LITE0 if lite else SCRATCH
    options.epochs = options.epochs or (digits_epochs if digits else FOLDER_EPOCHS)
    if options.lr is None:
        options.lr = SCRATCH_LR if options.weights == SCRATCH else TUNE_LR
    if not options.lr > 0:
        raise RecipeError(f"expected --lr above 0, got {options.lr}")
    if options.smoke:
        options.seeds, options.epochs, options.batch_size = 1, 1, 16
    check_model_name(options.model)
    _backbone(options, classes=2)


def _backbone(options: argparse.Namespace, classes: int) -> nn.Module:
    weights = None if options.weights == SCRATCH else options.weights
    return make_backbone(options.model, classes, weights=weights)[0]


def load(options: argparse.Namespace, seed: int) -> DomainData:
    """Load the images as one domain; the seed decides which of them test."""
    few = options.images_per_class
    if options.data is None:
        limit = SMOKE_DIGITS if options.smoke else None if few is None else 10 * few
        data = load_digits(options.image_size, seed, limit=limit, angles=(0,))
    else:
        limit = SMOKE_IMAGES_PER_CLASS if options.smoke else few
        data = load_folder(options.data, options.image_size, seed, limit=limit)
        data = replace(data, domains=torch.zeros_like(data.domains), domain_names=["all"])
    if options.train_per_class is None or options.smoke:
        return data
    return replace(data, train=_some(data, options.train_per_class, seed))


def _some(data: DomainData, count: int, seed: int) -> Tensor:
    """Mark `count` training images of each class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(data.train)
    for label, name in enumerate(data.classes):
        found = (data.train & (data.labels == label)).nonzero().flatten()
        if len(found) < count:
            raise RecipeError(
                f"expected --train-per-class of at most {len(found)}, the training images of "
                f"{name}, got {count}"
            )
        chosen[found[torch.randperm(len(found), generator=generator)[:count]]] = True
    return chosen


def settings(options: argparse.Namespace, seed: int, loss: str = "ce") -> Config:
    """Give the settings of one training."""
    return Config(
        image_size=options.image_size,
        model=options.model,
        loss=loss,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=seed,
    )


def build(
    options: argparse.Namespace,
    data: DomainData,
    config: Config,
    device: torch.device,
    without: tuple[str, ...] = (),
) -> tuple[nn.Module, Loader]:
    """Make the network that every method starts from, and what makes its batches.

    Args:
        options: as `resolve` left them.
        data: the images.
        config: of the training; its seed decides the random weights.
        device: where to.
        without: operations that AugMix leaves out.
    """
    torch.manual_seed(config.seed)
    model = _backbone(options, len(data.classes))
    images = timm.data.resolve_model_data_config(model)
    mix = AugMix(images["mean"], without) if config.loss.startswith("augmix") else None
    loader = Loader(data, images["mean"], images["std"], config.batch_size, device, mix)
    model.to(device)
    check_image_size(model, loader, config)
    if options.weights == SCRATCH:
        fill_statistics(model, loader, config)
    return model, loader


def train(name: str, model: nn.Module, loader: Loader, config: Config, log: grid.Log) -> None:
    """Train a model, with the loss that the settings name as far as its layers allow."""
    arm = make_arm(name, model, config, loader.batches_per_epoch)
    for epoch in range(config.epochs or 0):
        report = train_epoch([arm], loader, config, epoch)[name]
        figures: dict[str, Any] = {"epoch": epoch + 1, "loss": report["loss"]}
        log(figures)
    model.eval()
