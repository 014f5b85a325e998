"""What the recipes on images start from: the images, and a network that takes them.

Every method of a recipe starts from the same weights and sees the same images in the same order;
the figures are those of the last epoch, so nothing is chosen on test images.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import timm.data
import torch
from torch import Tensor, nn

from .augment import AugMix
from .data import DomainData, Loader
from .digits import ANGLES, load_digits
from .errors import RecipeError, check
from .folders import load_folder
from .options import DIGITS_MODEL, TUNED, ByData, Parser, count, of_cell, resolve
from .training import fill_statistics
from .weights import EFFICIENTNET_LITE0_TIMM, SCRATCH, make_backbone


def add_options(parser: Parser, digits_epochs: int = 6) -> None:
    parser.share("data", "weights", "tune", image_size=ByData(24, 64), batch_size=64, lr=TUNED)
    model = ByData(DIGITS_MODEL, EFFICIENTNET_LITE0_TIMM)
    parser.share(model=model, epochs=ByData(digits_epochs, 4))
    add = parser.add_argument
    each = "take so many of each class of each domain, of which a fifth tests, and of a folder "
    each += "with an official split so many for each part of it"
    few = "train on so many of each class, drawn at random, instead of all that do not test"
    add("--images-per-class", dest="limit", type=count, metavar="N", help=each)
    add("--train-per-class", type=count, metavar="N", help=few)


def settle(options: Namespace) -> None:
    few = ByData(10, 3)
    resolve(options, packaged=True, seeds=1, epochs=1, batch_size=16, limit=few)


def load_mixed(options: Namespace, seed: int) -> DomainData:
    """Load the images as one domain; the seed decides which of them test."""
    data = load(options, seed, angles=(0,))
    data = replace(data, domains=torch.zeros_like(data.domains), domain_names=["all"])
    if options.train_per_class is None or options.smoke:
        return data
    chosen = torch.zeros_like(data.train)
    chosen[pick(data, options.train_per_class, seed, "--train-per-class")] = True
    return replace(data, train=chosen)


def load(
    options: Namespace, seed: int = 0, angles: Sequence[int] = ANGLES,
    domains: Sequence[str] | None = None, flat: bool = False,
) -> DomainData:  # fmt: skip
    """Load the folder, or without one the digits at these angles; the seed decides which test."""
    given = of_cell(options)
    size, held_out, limit = given.image_size, given.held_out, given.limit
    if given.data is None:
        limit = limit and 10 * len(angles) * limit
        return load_digits(size, seed, held_out, limit, angles)
    data = load_folder(given.data, size, seed, held_out, limit, given.workers, domains, flat)
    return replace(data, augmentation=replace(data.augmentation, flip=given.flip))


def pick(data: DomainData, count: int, seed: int, option: str) -> Tensor:
    """Pick so many training images of each class at random; give their indices."""
    generator = torch.Generator().manual_seed(seed)
    picked = []
    for label, name in enumerate(data.classes):
        members = (data.train & (data.labels == label)).nonzero().flatten()
        most = f"at most {len(members)}, the training images of class {name!r}"
        check(len(members) >= count, f"expected {option} of {most}, got {count}")
        picked.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(picked)


def build(
    options: Namespace, data: DomainData, seed: int, without: tuple[str, ...] = (),
    fill: bool = True,
) -> tuple[nn.Module, Loader, list[str]]:  # fmt: skip
    """Make the network that every method starts from, and what makes its batches.

    `seed` is of random weights, which `fill` gives the statistics of the first batches; `without`
    are operations that AugMix leaves out. Beside model and loader come lines to tell the user.
    """
    given = of_cell(options)
    torch.manual_seed(seed)
    scratch = not given.pretrained and given.weights == SCRATCH
    model, notes = make_backbone(given.model, len(data.classes), given.pretrained, given.weights)
    model.to(given.device)
    images = timm.data.resolve_model_data_config(model)
    mix = AugMix(images["mean"], without) if given.loss.startswith("augmix") else None
    loader = Loader(data, images["mean"], images["std"], given.batch_size, given.device, mix)
    try:
        with torch.inference_mode():
            model.eval()(example(loader))
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"{given.model} cannot take images of {given.image_size} px "
            f"({str(error).splitlines()[0]}); set another --image-size"
        ) from error
    if fill and scratch:
        fill_statistics(model, loader, seed)
    return model, loader, notes


def example(loader: Loader) -> Tensor:
    return loader.batch(loader.train_indices[:2]).images
