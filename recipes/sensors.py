"""`python -m recipes sensors`: images of cameras that differ, the camera known.

Each image is seen by one of four sensors, which seed and index decide: `colour` as it is,
`infrared` inverted grey, `edges` of the grey image, `night` a quarter of the light and noise.
The sensor is the context. Accuracy is on other images, told the sensor, or not: then `pooled` and
`posterior` take one forward, `most confident` takes the surest of one for each sensor.

    bn          the network as it is, with BatchNorm
    cn          statistics, scale and shift of each sensor's own in every norm
    cn-first    these at the first norm alone (`select="first"`)
    cn-shared   statistics of each sensor's own, one scale and shift (`affine="shared"`)
    cn-x-batch  BatchNorm, then each sensor's learned mean and spread (`statistics="batch"`)
    cn-x        such a mean and spread alone

    NAME-frozen with the statistics that given weights came with, as evaluation has them

A ResNet of 8 layers is trained from scratch, or with --weights the timm model that these are of is
trained on, with a new head. By seed all methods have the same start, images and
order; figures are of the last epoch. By default it tells which of twelve photographs a tile is cut
from; half of the tiles test. --data takes images {train,test}/CLASS/image, or
DOMAIN/{train,test}/CLASS/image, of which the domains are the contexts and nothing else is done to
them; --limit is of each part of each domain. --drop-labels 0.25 hides a quarter of the labels from
training steps, for use where the sensor is not always known. With --tune each method's rate is a
third of --lr, it, or its threefold, by a fifth of the training images of seed 0; what tests is read
once, after that.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

from . import grid, images, methods, reports, scores
from .augment import Augmentation
from .data import DomainData, Loader, stratified_mask, validation
from .errors import RecipeError
from .options import ByData, ByStart, Parser, by_data, by_start, check_rates, of_cell, resolve
from .training import fill_statistics
from .weights import SCRATCH, make_backbone

# Those of scikit-image's wheel with detail nearly everywhere.
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina"),
)
SENSORS = ["colour", "infrared", "edges", "night"]
METHODS = ("bn", "cn", "cn-first", "cn-shared", "cn-x-batch")
TILES = 200
MEAN, STD = 0.5, 0.25  # of pixels, as the network from scratch takes them


def run(options: Namespace) -> None:
    smoke = {"epochs": 1, "limit": 4}
    if options.weights == SCRATCH:
        by_data(options, **smoke)
        by_start(options)
        check_rates(options)
    else:
        resolve(options, **smoke)
    device = images.pick_device(options.device)
    loaded = grid.Latest(lambda seed: load(options, seed))

    @grid.Latest  # the seed is the outer loop
    def data_of(seed: int) -> DomainData:
        data = loaded(0 if options.data else seed)
        return seen(data, seed) if len(data.domain_names) == 1 else data

    names = data_of(0).domain_names  # what is wrong with images is said before a run is made
    folder = grid.open_run(options, "sensors")
    records = run_rates(folder, options, data_of, partial(train_one, device), scores.known_mean)
    headings = {**{name: name for name in names}, "mean": "mean"}
    more = {"lr": "rate, 1e-3"} if options.tune else {}
    title = "accuracy by context, %"
    reports.show(folder, scores.rows_by_told(records), headings, title, more, "mean")


def run_rates(
    folder: Path,
    options: Namespace,
    data_of: Callable[[int], DomainData],
    train_one: Callable[[DomainData, Namespace, grid.Log, bool], dict[str, Any]],
    score: Callable[[dict[str, Any]], float],
) -> list[dict[str, Any]]:
    """Run the grid; `train_one` gets the data of the seed, or to try a rate those of validation."""

    def train(rates: dict[str, float], cell: grid.Cell, log: grid.Log) -> dict[str, Any]:
        data, final = data_of(cell["seed"]), "lr" not in cell
        config = of_cell(options, **{"lr": rates.get(cell["method"]), **cell})
        return train_one(data if final else validation(data), config, log, final)

    return grid.run_tuned(folder, options, train, score, grid.rates_of(options))


def load(options: Namespace, seed: int) -> DomainData:
    """Cut the tiles, or load a folder of the images that train and of those that test."""
    if options.data is None:
        return tiles(options.image_size, seed, options.limit or TILES)
    data = images.load(options)
    if not data.given_split:
        raise RecipeError(
            f"expected --data {options.data} to hold the folders train and test, of CLASS/image, "
            f"got {', '.join(data.domain_names)}"
        )
    return data


def tiles(size: int, seed: int, limit: int) -> DomainData:
    """Cut photographs into tiles; give so many of each at most to train, and as many to test."""
    from skimage import data

    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name in PHOTOGRAPHS:
        picture = torch.from_numpy(np.atleast_3d(getattr(data, name)())).permute(2, 0, 1)
        cut = picture.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).transpose(0, 1)
        chosen = torch.randperm(len(cut), generator=generator)[: 2 * limit]
        parts.append(cut[chosen].expand(-1, 3, -1, -1))
    labels = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    test = stratified_mask(labels, 0.5, generator)
    how = Augmentation(side=(0.8, 1.0), shift=0.0, flip=True)
    same = torch.zeros_like(labels)
    return DomainData(torch.cat(parts), labels, same, ~test, test, [*PHOTOGRAPHS], ["all"], how)


def seen(data: DomainData, seed: int) -> DomainData:
    """Give every image to one sensor, and show it as that one sees it."""
    generator = torch.Generator().manual_seed(seed)
    sensors = torch.randperm(len(data.images), generator=generator) % len(SENSORS)
    shown = torch.empty_like(data.images)
    for index, name in enumerate(SENSORS):
        chosen = sensors == index
        shown[chosen] = sense(data.images[chosen], name, generator)
    return replace(data, images=shown, domains=sensors, domain_names=SENSORS)


def sense(pictures: Tensor, sensor: str, generator: torch.Generator) -> Tensor:
    """Show images (N, 3, S, S) uint8 as a sensor sees them."""
    x = pictures.float()
    grey = x.mean(1, keepdim=True)
    if sensor == "infrared":
        x = 255 - grey
    elif sensor == "edges":
        across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])  # Sobel's
        kernels = torch.stack([across, across.T])[:, None] / 4
        x = F.conv2d(F.pad(grey, (1, 1, 1, 1), "replicate"), kernels).norm(dim=1, keepdim=True)
    elif sensor == "night":
        x = x / 4 + 16 * torch.randn(x.shape, generator=generator)
    return x.round().clamp(0, 255).to(torch.uint8).expand_as(pictures)


def network(classes: int, width: int = 16) -> nn.Module:
    """Make a ResNet of 8 layers for small images."""
    blocks = [BasicBlock(width, width)]
    for channels in (width, 2 * width):
        skip = downsample_conv(channels, 2 * channels, 1, stride=2)
        blocks.append(BasicBlock(channels, 2 * channels, stride=2, downsample=skip))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def start(
    data: DomainData, config: Namespace, device: torch.device, contexts: Sequence[str]
) -> tuple[nn.Module, Loader]:
    """Make the converted network that a training starts from, and what makes its batches."""
    torch.manual_seed(config.seed)
    model, mean, std = network(len(data.classes)), (MEAN,) * 3, (STD,) * 3
    if config.weights != SCRATCH:
        model, _ = make_backbone(config.model, len(data.classes), weights=config.weights)
        mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
    model.to(device)
    loader = Loader(data, mean, std, config.batch_size, device)
    if config.method == "cn-x" and config.weights == SCRATCH:
        fill_statistics(model, loader, config.seed)
    model = methods.convert(model, config.method, contexts)
    return model.to(memory_format=torch.channels_last), loader


def train_one(
    device: torch.device, data: DomainData, config: Namespace, log: grid.Log, final: bool
) -> dict[str, Any]:
    """Train one model; give its accuracies in per cent, by what it is told, by context."""
    model, loader = start(data, config, device, data.domain_names)
    images.train(config.method, model, loader, config, log)
    measure = partial(scores.by_domain, loader=loader, names=data.domain_names, amp=config.amp)
    policies = scores.EVERY if final else ()
    found = scores.by_told(model, lambda model, label: measure(model, label=label), policies)
    return {"accuracy": found, "lr": config.lr}


def add_options(parser: Parser) -> None:
    known = (*METHODS, "cn-x", "bn-frozen", "cn-frozen", "cn-first-frozen")
    grid.add_methods(parser, METHODS, known)
    parser.share("data", "model", "limit", "tune", "amp", flip=True, batch_size=64)
    parser.share(weights=SCRATCH, lr=ByStart(2e-3, 5e-4), drop_labels=0.0)
    parser.share(image_size=ByData(16, 32), epochs=ByData(10, 4))


main = partial(grid.command, "sensors", __doc__, add_options, run)
