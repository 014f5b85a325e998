"""The settings of a run: their defaults, the command line that changes them, and their record."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import normswap

from .errors import RecipeError
from .losses import LOSSES
from .weights import EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_TIMM

DIGITS_MODEL = "resnet10t"
DIGITS_EPOCHS = 12
FOLDER_EPOCHS = 10
SCRATCH_LR = 2e-3
# Weights that are given want smaller steps than random ones.
TUNE_LR = 3e-4
# What has no say in the numbers of a run may differ when it is resumed.
NOT_COMPARED = {"workers"}


@dataclass(frozen=True)
class Config:
    """The settings of a run; `resolve` decides most that are `None`, the data the image size."""

    data: str | None = None
    held_out: str | None = None
    image_size: int | None = None
    model: str | None = None
    pretrained: bool = False
    weights: str | None = None
    method: str = "cn-x"
    unknown: str = "pooled"
    loss: str = "ce"
    baseline: bool = True
    epochs: int | None = None
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 0.05
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    smoke: bool = False
    workers: int = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of `Config`.

    No option has a default here: one that was not given stays absent, so that a resumed run can
    tell what the user asked for from what is merely the default.
    """

    def option(flag: str, text: str, **kwargs: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kwargs)

    option("--data", "folder DOMAIN/CLASS/image (default: rotated handwritten digits)")
    option("--held-out", "domain that does not train, tested with its label unknown")
    option("--image-size", "pixels a side (default: 32 for digits, else the model's)", type=int)
    option("--model", f"any timm model with BatchNorm (default: {DIGITS_MODEL})")
    option("--pretrained", "start from timm's weights (downloads them)", action="store_true")
    option("--weights", f"start from a safetensors or torch file, or from {EFFICIENTNET_LITE0}")
    option("--method", "what replaces BatchNorm (default: cn-x)", choices=normswap.methods())
    option(
        "--unknown",
        "what an unknown label means to the norms (default: pooled)",
        choices=("pooled", "posterior"),
    )
    option(
        "--loss",
        "cross-entropy, alone or with JSD consistency over CrossNorm passes, AugMix or both "
        "(default: ce)",
        choices=LOSSES,
    )
    option(
        "--baseline",
        "train the unconverted model beside it (default: yes)",
        action=argparse.BooleanOptionalAction,
    )
    option("--epochs", f"(default: {DIGITS_EPOCHS} for digits, else {FOLDER_EPOCHS})", type=int)
    option("--batch-size", "images a step (default: 64)", type=int)
    option("--lr", "peak of AdamW's rate (default: 2e-3; from given weights 3e-4)", type=float)
    option("--weight-decay", "of all but norms and biases (default: 0.05)", type=float)
    option("--seed", "decides split, start, batches (default: 0)", type=int)
    option("--device", "auto, cpu, cuda, cuda:1, mps (default: auto)")
    option("--amp", "bfloat16 autocast", action="store_true")
    option("--smoke", "a few images and two epochs, to see that all works", action="store_true")
    option("--workers", "threads that decode images (default: 2)", type=int)


def resolve(given: dict[str, Any]) -> Config:
    """Complete what was given with defaults, and check it.

    Raises:
        RecipeError: if a value is out of range or two exclude each other.
    """
    config = Config(**given)
    for name in ("image_size", "epochs", "batch_size", "workers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise RecipeError(f"expected --{name.replace('_', '-')} of 1 or more, got {value}")
    lr = config.lr
    if lr is None:
        lr = TUNE_LR if config.pretrained or config.weights else SCRATCH_LR
    if not lr > 0:
        raise RecipeError(f"expected --lr above 0, got {lr}")
    if config.weight_decay < 0:
        raise RecipeError(f"expected --weight-decay of 0 or more, got {config.weight_decay}")
    if config.pretrained and config.weights:
        raise RecipeError("expected --pretrained or --weights, got both; name one start")
    model = config.model
    if model is None:
        lite = config.weights == EFFICIENTNET_LITE0
        model = EFFICIENTNET_LITE0_TIMM if lite else DIGITS_MODEL
    epochs = config.epochs
    if epochs is None:
        epochs = 2 if config.smoke else DIGITS_EPOCHS if config.data is None else FOLDER_EPOCHS
    return replace(config, model=model, epochs=epochs, lr=lr)


def resolve_resumed(given: dict[str, Any], saved: dict[str, Any]) -> Config:
    """Take a run's own settings again; what is given anew must agree with them.

    Raises:
        RecipeError: if an option differs from the run's, or the record is of another version.
    """
    known = {field.name for field in fields(Config)}
    if set(saved) != known:
        odd = ", ".join(sorted(set(saved) ^ known))
        raise RecipeError(
            f"expected config.json to hold the settings of this version, differs in {odd}; "
            "start a new run"
        )
    for name, value in given.items():
        if name not in NOT_COMPARED and value != saved[name]:
            raise RecipeError(
                f"expected --{name.replace('_', '-')} to be {saved[name]!r}, as in the run to "
                f"resume, got {value!r}; leave it out, or start a new run with another --name"
            )
    return Config(**{**saved, **{k: v for k, v in given.items() if k in NOT_COMPARED}})


def to_dict(config: Config) -> dict[str, Any]:
    """Give the settings as JSON-ready values."""
    return asdict(config)
