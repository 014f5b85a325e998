"""The options that recipes share: one table of them, defaults that the data decide, and checks."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import RecipeError
from .weights import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE0_TIMM,
    SCRATCH,
    check_model_name,
    image_size_of,
)

DIGITS_MODEL = "resnet10t"


@dataclass(frozen=True)
class ByData:
    """A default that depends on the data."""

    digits: Any
    folder: Any

    def __str__(self) -> str:
        return f"{self.digits}; with --data {self.folder or 'what the model takes'}"


@dataclass(frozen=True)
class ByStart:
    """A default that depends on the weights: given ones want smaller steps than random ones."""

    random: float
    given: float

    def __str__(self) -> str:
        return f"{self.random:g}; from given weights {self.given:g}"


TUNED = ByStart(2e-3, 3e-4)


def count(text: str) -> int:
    """Read a number of things of which there must be one or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


SHARED: dict[str, dict[str, Any]] = {
    "data": {"type": Path, "help": "folder or zip DOMAIN/CLASS/image, instead of the default data"},
    "image_size": {"type": count, "help": "pixels a side"},
    "model": {
        "help": f"any timm model with BatchNorm; without it {DIGITS_MODEL}, or with packaged "
        f"weights {EFFICIENTNET_LITE0_TIMM}"
    },
    "weights": {"help": f"a safetensors or torch file, {EFFICIENTNET_LITE0}, or {SCRATCH}"},
    "pretrained": {"action": "store_true", "help": "start from timm's weights (downloads them)"},
    "epochs": {"type": count, "help": "passes over the training images"},
    "steps": {"type": count, "help": "of training"},
    "batch_size": {"type": count, "help": "images a step"},
    "lr": {"type": float, "help": "peak of AdamW's rate"},
    "weight_decay": {"type": float, "help": "of all but norms and biases"},
    "amp": {"action": "store_true", "help": "bfloat16 by autocast"},
    "tune": {
        "action": "store_true",
        "help": "choose each method's rate, of a third of --lr, it, and its threefold, with seed 0 "
        "on a part of the training images that does not train then",
    },
    "drop_labels": {
        "type": float,
        "metavar": "P",
        "help": "hide each context label from a training step with this probability",
    },
    "limit": {"type": count, "metavar": "N", "help": "images of each class that train, and test"},
    "flip": {
        "action": argparse.BooleanOptionalAction,
        "help": "mirror training images of --data at random",
    },
    "device": {"help": "auto, cpu, cuda, cuda:1, mps, ..."},
    "smoke": {"action": "store_true", "help": "tiny, to see that all works"},
    "out": {"type": Path, "help": "where runs go"},
    "name": {"help": "the run's folder, instead of one named by what it does"},
    "resume": {"action": "store_true", "help": "continue a run that was stopped"},
}
# What a training reads, where a recipe has no option for it.
DEFAULTS = {
    "pretrained": False, "held_out": None, "limit": None, "loss": "ce", "amp": False,
    "batch_size": 64, "weight_decay": 0.05, "workers": 2, "flip": True, "drop_labels": 0.0,
    "weights": SCRATCH, "ema": 0.0,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose help tells the defaults and whose errors are those of a recipe."""

    def __init__(self, command: str, text: str | None) -> None:
        super().__init__(f"python -m recipes {command}", description=text, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)

    def share(self, *names: str, **defaults: Any) -> None:
        """Add options of `SHARED`, by name, or by name with the recipe's default."""
        for name, default in {**dict.fromkeys(names), **defaults}.items():
            keywords = {**SHARED[name]} if default is None else {**SHARED[name], "default": default}
            self.add_argument(f"--{name.replace('_', '-')}", **keywords)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is not None and action.default is not False
        return super()._get_help_string(action) if told else action.help


def resolve(options: argparse.Namespace, packaged: bool = False, **smoke: Any) -> None:
    """Decide what was left to data and weights, so that a run's record says it, and check it.

    With `packaged`, the packaged model starts from its packaged weights unless told otherwise;
    `smoke` has the values of a smoke test.
    """
    by_data(options, **smoke)
    given = vars(options)
    pretrained = given.get("pretrained", False)
    if pretrained and options.weights not in (None, SCRATCH):
        raise RecipeError("expected --pretrained or --weights, got both; name one start")
    if options.model is None:
        lite = options.weights == EFFICIENTNET_LITE0
        options.model = EFFICIENTNET_LITE0_TIMM if lite else DIGITS_MODEL
    if options.weights is None:
        lite = packaged and options.model == EFFICIENTNET_LITE0_TIMM
        options.weights = EFFICIENTNET_LITE0 if lite else SCRATCH
    by_start(options)
    check_rates(options)
    check_model_name(options.model)
    if options.image_size is None:
        options.image_size = image_size_of(options.model)


def by_data(options: argparse.Namespace, **smoke: Any) -> None:
    """Decide what was left to the data; `smoke` has the values of a smoke test."""
    given = vars(options)
    if options.smoke:
        given.update(smoke)
    for name, value in given.items():
        if isinstance(value, ByData):
            given[name] = value.digits if options.data is None else value.folder


def by_start(options: argparse.Namespace) -> None:
    """Decide the rate, where it was left to the weights."""
    if isinstance(options.lr, ByStart):
        scratch = options.weights == SCRATCH and not vars(options).get("pretrained", False)
        options.lr = options.lr.random if scratch else options.lr.given


def check_rates(options: argparse.Namespace) -> None:
    """Refuse a rate, a weight decay or a share of labels that nothing can be trained with."""
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if name.startswith("lr") and value is not None and not value > 0:
            raise RecipeError(f"expected {flag} above 0, got {value}")
        if name == "weight_decay" and value < 0:
            raise RecipeError(f"expected {flag} of 0 or more, got {value}")
        if name == "drop_labels" and not 0 <= value <= 1:
            raise RecipeError(f"expected {flag} in [0, 1], got {value}")


def of_cell(options: argparse.Namespace, **settings: Any) -> argparse.Namespace:
    """Give the settings of one training of many."""
    return argparse.Namespace(**{**DEFAULTS, **vars(options), **settings})
