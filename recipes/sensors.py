"""`python -m recipes sensors`: images of cameras that differ, the camera known.

Each image is seen by one of four sensors, which seed and index decide: `colour` as it is,
`infrared` inverted grey, `edges` of the grey image, `night` a quarter of the light and noise.
The sensor is the context. Accuracy is on other images, told the sensor, or not: then `pooled` and
`posterior` take one forward, `most confident` takes the surest of one for each sensor.

A ResNet of 8 layers is trained from scratch, or with --weights the timm model that these are of is
trained on, with a new head. Figures are of the last epoch. By default it tells which of twelve
photographs a tile is cut from; half of the tiles test. --data takes images
{train,test}/CLASS/image, or DOMAIN/{train,test}/CLASS/image, of which the domains are the contexts
and nothing else is done to them; --limit is of each part of each domain. --drop-labels 0.25 hides a
quarter of the labels from training steps, for use where the sensor is not always known.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import grid, reports, scores, tiles
from .common.data import DomainData
from .common.options import ByData, ByStart, Parser, resolve
from .common.training import Log, train
from .common.weights import SCRATCH

SENSORS = ["colour", "infrared", "edges", "night"]
METHODS = ("bn", "cn", "cn-first", "cn-x-batch")


def run(options: Namespace) -> None:
    resolve(options, backbone=options.weights != SCRATCH, epochs=1, limit=4)
    given = tiles.source(options)

    def data_of(config: Namespace) -> DomainData:
        data = given(config)
        return seen(data, config.seed) if len(data.domain_names) == 1 else data

    folder, records = grid.run(options, "sensors", data_of, train_one, scores.known_mean)
    names = next(iter(records[0]["accuracy"].values()))
    headings = {**{name: name for name in names}, "mean": "mean"}
    rows, title = scores.rows_by_told(records), "accuracy by context, %"
    reports.show(folder, rows, headings, title, compared="mean")


def seen(data: DomainData, seed: int) -> DomainData:
    """Give every image to one sensor, and show it as that one sees it."""
    generator = torch.Generator().manual_seed(seed)
    sensors = torch.randperm(len(data.images), generator=generator) % len(SENSORS)
    shown = torch.empty_like(data.images)
    for index, name in enumerate(SENSORS):
        shown[sensors == index] = sense(data.images[sensors == index], name, generator)
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


def train_one(data: DomainData, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model; give its accuracies in per cent, by what it is told, by context."""
    model, loader = tiles.start(data, config, data.domain_names)
    train(config.method, model, loader, config, log)

    def measure(model: nn.Module, label: scores.Label | None) -> dict[str, float]:
        return scores.by_domain(model, loader, data.domain_names, label, config.amp)

    found = scores.by_told(model, measure, scores.EVERY if config.final else ())
    return {"accuracy": found}


def add_options(parser: Parser) -> None:
    known = (*METHODS, "cn-shared", "cn-x", "bn-frozen", "cn-frozen", "cn-first-frozen")
    tiles.add_options(parser, METHODS, known)
    parser.share("model", weights=SCRATCH, lr=ByStart(2e-3, 5e-4), drop_labels=0.0)
    parser.share(epochs=ByData(10, 4))
