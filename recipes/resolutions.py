"""`python -m recipes resolutions`: one network for images of several sizes, the size as context.

Each step trains on the same batch at every size of --sizes, and takes the mean of their losses. A
network meets objects of another size, and statistics that are others, where its input is smaller;
the paper gives each size a BatchNorm of its own, which is `cn`.

    bn-alone    as many networks as there are sizes, each trained and tested at one

Accuracy is on the test images at each size, after the last step. Data and --limit are as of
`sensors`, without its cameras.

Source: Wang et al., "Resolution Switchable Networks for Runtime Efficient Image Recognition", ECCV
2020, arXiv 2007.09558. Differs from source: without the distillation between sizes.
"""

from argparse import Namespace
from functools import partial
from operator import itemgetter
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import grid, reports, tiles
from .common.data import Batch, DomainData, Loader
from .common.errors import check
from .common.options import Parser, count, resolve
from .common.tiles import start
from .common.training import Log, fit_epochs, told

METHODS = ("bn", "bn-alone", "cn", "cn-first", "cn-x-batch")


def run(options: Namespace) -> None:
    resolve(options, backbone=False, epochs=1, limit=4)
    whole = options.image_size
    sizes = options.sizes = options.sizes or [whole, whole * 3 // 4, whole // 2]
    expected = f"expected --sizes to be two or more, each another, of at most {whole}"
    fine = 1 < len(set(sizes)) == len(sizes) and max(sizes) <= whole
    check(fine, f"{expected}, got {', '.join(map(str, sizes))}")
    chosen, source = itemgetter("mean"), tiles.source(options)
    folder, records = grid.run(options, "resolutions", source, train_one, chosen)
    headings = {f"at_{size}": f"{size} px" for size in sizes} | {"mean": "mean"}
    reports.show(folder, records, headings, "accuracy by size, %", compared="mean")


def train_one(data: DomainData, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model, or of `bn-alone` one a size; give the accuracy in per cent at each size."""
    sizes = config.sizes
    figures = {}
    for some in [[size] for size in sizes] if config.method == "bn-alone" else [sizes]:
        model, loader = start(data, config, list(map(str, sizes)))
        model, _ = fit_epochs(model, partial(loss, sizes=some), loader, config, log)
        figures |= {f"at_{size}": accuracy(model, loader, size) for size in some}
    return {**figures, "mean": mean(figures.values())}


def loss(model: nn.Module, batch: Batch, sizes: list[int]) -> Tensor:
    losses = [F.cross_entropy(at(model, batch.images, size), batch.labels) for size in sizes]
    return torch.stack(losses).mean()


def at(model: nn.Module, pictures: Tensor, size: int) -> Tensor:
    """Give a model's answers for images of another size, which it is told if it takes contexts."""
    smaller = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return told(model, smaller, str(size))


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Loader, size: int) -> float:
    """Measure the accuracy in per cent on the test images at a size."""
    model.eval()
    tested = loader.test_indices()
    batches = loader.whole(tested)
    hits = [(at(model, b.images, size).argmax(1) == b.labels).sum() for b in batches]
    return 100 * int(torch.stack(hits).sum()) / len(tested)


def add_options(parser: Parser) -> None:
    tiles.add_options(parser, METHODS, (*METHODS, "cn-shared"))
    parser.share(lr=2e-3, epochs=4)
    sizes = "--image-size or less (default: it, three quarters and half of it)"
    parser.add_argument("--sizes", type=count, nargs="+", metavar="PX", help=sizes)
