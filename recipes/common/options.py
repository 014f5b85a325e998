"""The options that recipes share: one table of them, defaults that the data decide, and checks."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch

from .errors import RecipeError, check
from .weights import EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_TIMM, SCRATCH, check_model_name

DIGITS_MODEL = "resnet10t"


@dataclass(frozen=True)
class ByData:
    """A default that depends on the data: the recipe's own, or a folder of --data."""

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


def number(
    kind: Callable[[str], float], where: str, fine: Callable[[float], bool]
) -> Callable[[str], float]:
    """Give a reader of numbers of a kind that says where they may lie."""

    def read(text: str) -> float:
        value = kind(text)
        if not fine(value):
            raise argparse.ArgumentTypeError(f"expected {where}, got {text}")
        return value

    read.__name__ = kind.__name__  # by which argparse tells what is no number at all
    return read


count = number(int, "1 or more", lambda x: x >= 1)
rate = number(float, "a number above 0", lambda x: 0 < x < math.inf)
decay = number(float, "0 or more", lambda x: 0 <= x < math.inf)
fraction = number(float, "a number in [0, 1]", lambda x: 0 <= x <= 1)
averaging = number(float, "a number in [0, 1)", lambda x: 0 <= x < 1)


def pick_device(name: str) -> torch.device:
    """Give the device of this name; `auto` is the first accelerator, else the CPU.

    Of the processes that torchrun starts, each on a machine has its own GPU.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    expected = "expected --device auto, cpu or cuda with several processes"
    one = f"{expected}, got {name!r}; each takes the GPU of its number"
    check(not (several and ":" in name), one)
    if name == "auto":
        name = (torch.accelerator.current_accelerator(True) or torch.device("cpu")).type
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"expected --device to be usable, got {name!r}: {reason}") from error


# By name: what reads it (None for a switch, bool for --NAME and --no-NAME, list for several rates
# or none), and its help.
SHARED: dict[str, tuple[Any, str]] = {
    "data": (Path, "folder or zip DOMAIN/CLASS/image, instead of the default data"),
    "image_size": (count, "pixels a side"),
    "model": (
        str,
        f"any timm model with BatchNorm; without it {DIGITS_MODEL}, or with packaged weights "
        f"{EFFICIENTNET_LITE0_TIMM}",
    ),
    "weights": (str, f"a safetensors or torch file, {EFFICIENTNET_LITE0}, or {SCRATCH}"),
    "pretrained": (None, "start from timm's weights (downloads them)"),
    "epochs": (count, "passes over the training images"),
    "steps": (count, "of training"),
    "batch_size": (count, "images a step"),
    "lr": (rate, "peak of AdamW's rate"),
    "weight_decay": (decay, "of all but norms and biases"),
    "ema": (averaging, "decay of the averaged weights"),
    "amp": (None, "bfloat16 by autocast"),
    "tune": (
        list,
        "choose each method's rate, of these, or of a third of --lr, it, and its threefold, with "
        "seed 0 on a part of the training images that does not train then",
    ),
    "drop_labels": (fraction, "hide each context label from a training step with this probability"),
    "limit": (count, "images of each class that train, and test"),
    "flip": (bool, "mirror training images of --data at random"),
    "workers": (count, "processes that decode images"),
    "device": (str, "auto, cpu, cuda, cuda:1, mps, ..."),
    "smoke": (None, "tiny, to see that all works"),
    "out": (Path, "where runs go"),
    "name": (str, "the run's folder, instead of one named by what it does"),
    "resume": (None, "continue a run that was stopped"),
}
# What a training reads, where a recipe has no option for it.
DEFAULTS = {
    "pretrained": False, "held_out": None, "limit": None, "loss": "ce", "amp": False,
    "batch_size": 64, "weight_decay": 0.05, "workers": 2, "flip": True, "drop_labels": 0.0,
    "weights": SCRATCH, "ema": 0.0, "final": True, "device": torch.device("cpu"),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose help tells the defaults and whose errors are those of a recipe."""

    def __init__(self, command: str, text: str | None) -> None:
        super().__init__(f"python -m recipes {command}", description=text, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)

    def share(self, *names: str, **defaults: Any) -> None:
        """Add options of `SHARED`, by name, or by name with the recipe's default."""
        actions = {None: "store_true", bool: argparse.BooleanOptionalAction}
        for name, default in {**dict.fromkeys(names), **defaults}.items():
            kind, text = SHARED[name]
            how = {"action": actions[kind]} if kind in actions else {"type": kind}
            if kind is list:
                how = {"type": rate, "nargs": "*", "metavar": "RATE"}
            given = {} if default is None else {"default": default}
            self.add_argument(f"--{name.replace('_', '-')}", help=text, **how, **given)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is not None and action.default is not False
        return super()._get_help_string(action) if told else action.help


def resolve(
    options: argparse.Namespace, packaged: bool = False, backbone: bool = True, **smoke: Any
) -> None:
    """Decide what was left to data and weights, so that a run's record says it, and check it.

    With `packaged`, the packaged model starts from its packaged weights unless told otherwise;
    without `backbone` the model is the recipe's; `smoke` has the values of a smoke test.
    """
    given = vars(options)
    given.update(smoke if options.smoke else {})
    for name, value in given.items():
        if isinstance(value, ByData):
            given[name] = value.digits if options.data is None else value.folder
    pretrained = given.get("pretrained", False)
    if backbone:
        both = pretrained and options.weights not in (None, SCRATCH)
        check(not both, "expected --pretrained or --weights, got both; name one start")
        lite = options.weights == EFFICIENTNET_LITE0
        options.model = options.model or (EFFICIENTNET_LITE0_TIMM if lite else DIGITS_MODEL)
        lite = packaged and options.model == EFFICIENTNET_LITE0_TIMM
        options.weights = options.weights or (EFFICIENTNET_LITE0 if lite else SCRATCH)
        check_model_name(options.model)
        made_for = timm.get_pretrained_cfg_value(options.model, "input_size")
        options.image_size = options.image_size or made_for[-1]
    if isinstance(given.get("lr"), ByStart):
        scratch = options.weights == SCRATCH and not pretrained
        options.lr = options.lr.random if scratch else options.lr.given
    options.device = pick_device(options.device)


def of_cell(options: argparse.Namespace, **settings: Any) -> argparse.Namespace:
    """Give the settings of one training of many."""
    return argparse.Namespace(**{**DEFAULTS, **vars(options), **settings})
