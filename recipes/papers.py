"""`python -m recipes papers`: the classification table of context normalization, again.

One norm of a shallow CNN of three convolutions is replaced, and all is trained from scratch. The
contexts are the Gaussians of a mixture fitted to the training images, to 16 principal components of
their pixels. An image is told the one it most probably comes from, in training and in the test.

Figures are of the last epoch. Each method's rate is the best of --rates, with seed 0, on a fifth of
the training images, which does not train then; what tests is read once, after that.

Published at 100 epochs of CIFAR-10, rate 1e-3: bn 86.90, cn-x 87.57, acn 87.97 (Faye et al., arXiv
2403.16798). Chosen here: widths, the classifier, which norm, windows and mirrorings, a rate that
warms up and falls, and no decay of norms. Without --data it trains on tiles of photographs.
"""

import getpass
import tempfile
import time
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import joblib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

from .common import grid, methods, reports, runs, tiles
from .common.augment import Augmentation
from .common.data import DomainData, validation
from .common.options import ByData, Parser, count, rate, resolve
from .common.training import LARGE, Log, check_finite, descend, make_optimizer, told

METHODS = "cn", "cn-x", "cn-x-batch", "acn"
TEST_BATCH = 1000
PADDING = 4


def run(options: Namespace) -> None:
    small = {"epochs": 1, "rate_epochs": 1, "limit": 8, "batch_size": 32, "width": 8}
    resolve(options, backbone=False, **small)
    path, chosen = prepared(options), itemgetter("accuracy")
    folder, records = grid.run(
        options, "papers", lambda config: load(path, config.device), train_one, chosen,
        rates=options.rates,
    )  # fmt: skip
    early = max(1, options.epochs // 4)
    rows = [{**r, "early": r["losses"][early - 1]} for r in records]
    more = {"early": f"loss of epoch {early}"}
    title = "accuracy of a shallow CNN, %"
    reports.show(folder, rows, {"accuracy": "accuracy, %"}, title, more, "accuracy", digits=2)


def prepared(options: Namespace) -> Path:
    """Give a file of the decoded images and their contexts; one of a zip is made once."""
    key: list[Any] = [options.data, options.image_size, options.limit, options.contexts]
    if options.data is not None and options.data.exists():
        key += [options.data.resolve(), options.data.stat().st_size, options.data.stat().st_mtime]
    name = f"normswap-papers-{getpass.getuser()}-{joblib.hash(repr(key))}.pt"
    path = Path(tempfile.gettempdir(), name)
    if not path.exists() or options.data is None or options.data.is_dir():
        data = tiles.load(options, seed=0)
        trains = data.images[data.train].split(TEST_BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", normswap.ContextWarning)  # of small ones: they may be
            mixture = normswap.contexts.gaussian_mixture(trains, options.contexts, progress=False)
        found = torch.cat([mixture(part) for part in data.images.split(TEST_BATCH)])
        fields = vars(replace(data, domains=found, domain_names=list(mixture.names)))
        with runs.atomic(path) as whole:
            torch.save({k: v for k, v in fields.items() if k != "augmentation"}, whole)
    return path


@lru_cache(maxsize=1)
def load(path: Path, device: torch.device) -> DomainData:
    """Load the images once a process, (N, H, W, 3) uint8; they stay on the device whole."""
    how = Augmentation(side=(1.0, 1.0), shift=PADDING, flip=True)
    data = DomainData(**torch.load(path, weights_only=True), augmentation=how)
    return replace(data, images=data.images.to(device).permute(0, 2, 3, 1).contiguous())


def ready(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float().sub(127.5).div(63.75)


def epoch_of(
    data: DomainData, chosen: Tensor, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give batches of images, labels and contexts; seed and epoch alone decide them.

    All images of the epoch are shifted and mirrored at once, on their device, as uint8, by what is
    drawn on the CPU, so that all devices see the same.
    """
    generator = torch.Generator().manual_seed(seed * LARGE + epoch)
    device, size = data.images.device, data.images.shape[1]
    whole = len(chosen) - len(chosen) % min(batch_size, len(chosen))
    order = chosen[torch.randperm(len(chosen), generator=generator)[:whole]].to(device)
    shifts = torch.randint(2 * PADDING + 1, (2, whole, 1), generator=generator).to(device)
    mirrored = torch.rand(whole, 1, generator=generator).to(device) < 0.5
    line = torch.arange(size, device=device)
    rows, columns = shifts[0] + line, shifts[1] + torch.where(mirrored, line.flip(0), line)
    padded = F.pad(data.images, (0, 0, *(PADDING,) * 4))
    pixels = padded[order[:, None, None], rows[:, :, None], columns[:, None, :]]
    for index, part in zip(order.split(batch_size), pixels.split(batch_size), strict=True):
        yield ready(part), data.labels[index], data.domains[index]


def network(classes: int, width: int, size: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(pairwise((3, width, 2 * width, 4 * width)), 1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(after)
        layers[f"pool{i}"] = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    layers["head"] = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * (size // 8) ** 2, classes))
    return nn.Sequential(layers)


def train_one(data: DomainData, config: Namespace, _: Log) -> dict[str, Any]:
    """Train one model; give its accuracy in per cent, and the mean loss of every epoch."""
    start, device = time.perf_counter(), data.images.device
    data = data if config.final else validation(data)
    epochs = config.epochs if config.final else config.rate_epochs
    chosen, tests = data.train.nonzero()[:, 0], data.test.nonzero()[:, 0]
    data = replace(data, labels=data.labels.to(device), domains=data.domains.to(device))
    batches = partial(epoch_of, data, chosen, config.batch_size, config.seed)
    torch.manual_seed(config.seed)
    model = network(len(data.classes), config.width, data.images.shape[1]).to(device)
    # A norm that learns its statistics must not start from what a fresh BatchNorm claims.
    torch.optim.swa_utils.update_bn((x for x, *_ in islice(batches(-1), 8)), model)
    if config.method in METHODS:
        components = {"components": config.contexts} if config.method == "acn" else {}
        where = {"select": f"norm{config.norm}", **components}
        model = methods.convert(model, config.method, data.domain_names, **where)
    model.to(memory_format=torch.channels_last)
    steps = max(1, len(chosen) // config.batch_size)
    optimizer, schedule = make_optimizer(model, config.lr, config.weight_decay, epochs * steps)

    def scores(x: Tensor, contexts: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            return told(model, x, contexts).float()

    model.train()
    losses = torch.zeros(epochs, device=device)  # read at the end: no step waits for the device
    for epoch in range(epochs):
        for step, (x, labels, contexts) in enumerate(batches(epoch)):
            schedule.step_update(epoch * steps + step)
            loss = F.cross_entropy(scores(x, contexts), labels)
            descend(loss, optimizer)
            losses[epoch] += loss.detach() / steps
    if config.final:  # one that is tried may be too large
        check_finite(losses[-1].item(), f"of {config.method}, seed {config.seed},", config.lr)
    model.eval()
    hits = torch.zeros((), device=device)
    with torch.inference_mode():
        for part in tests.to(device).split(TEST_BATCH):
            found = scores(ready(data.images[part]), data.domains[part]).argmax(1)
            hits += (found == data.labels[part]).sum()
    seconds = round(time.perf_counter() - start, 1)
    figures = {"accuracy": 100 * hits.item() / len(tests), "seconds": seconds}
    return {**figures, "losses": losses.tolist()}


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, ("bn", "cn", "cn-x", "acn"), ("bn", *METHODS))
    parser.share(image_size=ByData(16, 32), epochs=20, batch_size=256, weight_decay=1e-4)
    parser.share("data", "limit", "amp", workers=2)
    add = parser.add_argument
    add("--rates", type=rate, nargs="+", default=[3e-4, 1e-3, 3e-3], help="of AdamW, to choose of")
    add("--rate-epochs", type=count, default=5, help="epochs of each choice of a rate")
    add("--contexts", type=count, default=3, help="Gaussians of the mixture")
    add("--norm", type=int, choices=(1, 2, 3), default=1, help="which of the three is replaced")
    add("--width", type=count, default=64, help="channels of the first convolution; then 2x, 4x")
