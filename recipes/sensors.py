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

A ResNet of 8 layers is trained from scratch. By seed all methods have the same start, images and
order; figures are of the last epoch. By default it tells which of twelve photographs a tile is cut
from; half of the tiles test. With --tune each method's rate is a third of --lr, it, or its
threefold, by a fifth of the training images of seed 0; what tests is read once, after that.
"""

import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

import normswap

from . import grid, images, reports, scores
from .augment import Augmentation
from .data import DomainData, Loader, stratified_mask
from .errors import RecipeError
from .folders import OFFICIAL
from .options import ByData, Parser, by_data, check_rates, count, of_cell
from .training import takes_context

# Those of scikit-image's wheel with detail nearly everywhere.
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina"),
)
SENSORS = ["colour", "infrared", "edges", "night"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cn": ("cn", {}),
    "cn-first": ("cn", {"select": "first"}),
    "cn-shared": ("cn", {"affine": "shared"}),
    "cn-x-batch": ("cn-x", {"statistics": "batch"}),
}
TILES = 200
KNOWN = "known"


def run(options: Namespace) -> None:
    by_data(options, epochs=1, limit=4)
    check_rates(options)
    device = images.pick_device(options.device)

    @grid.Latest  # the seed is the outer loop
    def data_of(seed: int) -> DomainData:
        return seen(load(options, seed), seed)

    data_of(0)  # what is wrong with images is said before a run is made
    folder = grid.open_run(options, "sensors")
    jobs = grid.jobs_of(options)

    def train(cell: grid.Cell, log: grid.Log) -> dict[str, Any]:
        data = data_of(cell["seed"])
        config = of_cell(options, **{"lr": rates[cell["method"]], **cell})
        return train_one(validation(data) if "lr" in cell else data, config, device, log)

    rates = dict.fromkeys(options.methods, options.lr)
    if options.tune:
        tried = [
            {"method": method, "seed": 0, "lr": options.lr * factor}
            for method in options.methods
            for factor in (1 / 3, 1, 3)
        ]
        for record in sorted(grid.run_cells(folder, tried, train, jobs), key=known_mean):
            rates[record["cell"]["method"]] = record["cell"]["lr"]
    records = grid.run_cells(folder, grid.cells(options), train, jobs)
    headings = {**{name: name for name in SENSORS}, "mean": "mean"}
    more = {"lr": "rate, 1e-3"} if options.tune else {}
    reports.show(folder, tabulated(records), headings, "accuracy by sensor", more, "mean")


def load(options: Namespace, seed: int) -> DomainData:
    """Cut the tiles, or load a folder of the images that train and of those that test."""
    if options.data is None:
        return tiles(options.image_size, seed, options.limit or TILES)
    data = images.load(options)
    if data.domain_names != OFFICIAL:
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


def validation(data: DomainData) -> DomainData:
    """Let a fifth of the training images of each class test in place of those that do."""
    groups = torch.where(data.train, data.labels, -1)
    chosen = data.train & stratified_mask(groups, 0.2, torch.Generator().manual_seed(0))
    return replace(data, train=data.train & ~chosen, test=chosen)


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


class Surest(nn.Module):
    """Answers as the context that is surest of an image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return normswap.most_confident(self.model, x)[0]


def train_one(
    data: DomainData, config: Namespace, device: torch.device, log: grid.Log
) -> dict[str, Any]:
    """Train one model; give its accuracies in per cent, by what it is told, by sensor."""
    torch.manual_seed(config.seed)
    model = network(len(data.classes))
    if config.method in METHODS:
        method, settings = METHODS[config.method]
        model = normswap.convert(model, method, contexts=SENSORS, **settings)
    model.to(device, memory_format=torch.channels_last)
    loader = Loader(data, (0.5,) * 3, (0.25,) * 3, config.batch_size, device)
    images.train(config.method, model, loader, config, log)
    measure = partial(scores.by_domain, loader=loader, names=SENSORS)
    if not takes_context(model):
        return {"accuracy": {"": measure(model)}, "lr": config.lr}
    found = {KNOWN: measure(model, label=scores.own)}
    for policy in scores.POLICIES:
        normswap.set_unknown(model, policy)
        found[policy] = measure(model)
    found["most confident"] = measure(Surest(model))
    return {"accuracy": found, "lr": config.lr}


def known_mean(record: dict[str, Any]) -> float:
    """Give the mean over sensors, told to the methods that take them."""
    accuracy = record["accuracy"]
    return statistics.mean(accuracy.get(KNOWN, accuracy.get("")).values())


def tabulated(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give one record a method, what it is told, and seed."""
    rows = []
    for record in records:
        method, seed = record["cell"].values()
        for told, accuracy in record["accuracy"].items():
            cell = {"method": f"{method}, {told}" if told else method, "seed": seed}
            mean = statistics.mean(accuracy.values())
            rows.append({"cell": cell, **accuracy, "mean": mean, "lr": 1000 * record["lr"]})
    return rows


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, ("bn", *METHODS))
    parser.share(image_size=ByData(16, 32), epochs=ByData(10, 4), batch_size=64, lr=2e-3)
    add = parser.add_argument
    add("--data", type=Path, help="folder or zip {train,test}/CLASS/image, instead of tiles")
    add(
        "--limit", type=count, metavar="N",
        help=f"images of each class that train, and that test; {TILES} of tiles unless given",
    )  # fmt: skip
    add("--tune", action="store_true", help="choose each method's rate, as told above")


main = partial(grid.command, "sensors", __doc__, add_options, run)
