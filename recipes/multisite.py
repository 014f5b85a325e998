"""`python -m recipes multisite`: vessels of the retina from cameras that differ, the camera known.

A U-Net (Ronneberger et al., MICCAI 2015) over a timm `features_only` backbone trains on patches of
the images of all sites together; the site is the context. Tested are whole images of each site,
told the site, or not. A site's Dice is the mean over its images, its AUC is over all their pixels,
neither with a mask of the field of view.

    bn          the network as it is, with BatchNorm
    bn-frozen   the backbone's BatchNorm keeps the statistics of the given weights
    cn          statistics, scale and shift of each site's own in every norm
    cn-first    these at the first norm alone (`select="first"`)
    cn-x        a learned mean and spread for each site, no statistics of the batch
    cn-x-batch  BatchNorm, then each site's learned mean and spread (`statistics="batch"`)

With --adapt SITE it trains on that site alone and sees images of the others without masks: `as is`
they are taken for the site's own; `adapted` has statistics of theirs, re-estimated in a BatchNorm
(AdaBN), or in a context that is added for them, which leaves the site's own answers as they were.

By seed all methods have the same start, patches and order; the model tested is the moving average
of the weights after the last step. With --tune each method's rate is a third of --lr, it, or its
threefold, by the last fifth of the training images; what tests is read once, after that.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import normswap

from . import grid, images, methods, reports, scores, unlabelled
from .errors import RecipeError, check_names
from .options import Parser, count, of_cell, resolve
from .scenes import IGNORED, TEST, TRAIN, VALID, Scenes
from .scenes_folder import read_sites, without_validation
from .training import takes_context
from .weights import EFFICIENTNET_LITE0, NARROW, SCRATCH, make_features

METHODS = ("bn", "cn", "cn-first", "cn-x", "cn-x-batch")
FILL = 8  # batches from which new norms get their first statistics
ADAPT = 32  # batches of patches that a site is adapted to
WHOLE = 4  # whole images a forward


class UNet(nn.Module):
    """Features of a backbone, coarse to fine, each joined by those of twice the size."""

    def __init__(self, options: Namespace) -> None:
        super().__init__()
        given = options.pretrained, options.weights
        self.backbone = make_features(options.model, options.levels, *given)
        skips = [3, *self.backbone.feature_info.channels()]
        above, joins = skips[-1], []
        for skip in reversed(skips[:-1]):
            wide = max(skip, options.width)
            joins.append(nn.Sequential(
                nn.Conv2d(above + skip, wide, 3, padding=1, bias=False),
                nn.BatchNorm2d(wide), nn.ReLU(),
            ))  # fmt: skip
            above = wide
        self.joins = nn.ModuleList(joins)
        self.head = nn.Conv2d(above, 2, 1)
        self.register_buffer(
            "mean", torch.tensor(self.backbone.pretrained_cfg["mean"])[:, None, None]
        )
        self.register_buffer(
            "std", torch.tensor(self.backbone.pretrained_cfg["std"])[:, None, None]
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Give scores (N, 2, H, W) of images (N, 3, H, W) in [0, 1]."""
        x = (pictures - self.mean) / self.std
        skips = [x, *self.backbone(x)]
        x = skips[len(self.joins)]
        for i in range(len(self.joins)):  # by number, as in `segment.FCN`
            skip = skips[len(self.joins) - 1 - i]
            x = self.joins[i](torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1))
        return self.head(x)


def run(options: Namespace) -> None:
    if options.model is None and options.weights != EFFICIENTNET_LITE0:
        options.model = NARROW
    resolve(options, steps=2, batch_size=4, image_size=64, patch=32, limit=5)
    device = images.pick_device(options.device)
    data = read_sites(options.data, options.image_size, options.limit)
    if options.adapt is not None:
        check_names("--adapt to be one of the sites", [options.adapt], data.sources)
    if not options.patch <= options.image_size:
        raise RecipeError(f"expected --patch of at most {options.image_size}, got {options.patch}")
    for method in options.methods:  # what cannot be converted is said before a run is made
        build(method, options, data, 0)
    folder = grid.open_run(options, "multisite")

    def train(rates: dict[str, float], cell: grid.Cell, log: grid.Log) -> dict[str, Any]:
        config = of_cell(options, **{"lr": rates.get(cell["method"]), **cell})
        return train_one(without_validation(data) if "lr" in cell else data, config, device, log)

    records = grid.tuned(folder, options, train, lambda r: mean(told(r["dice"]).values()))
    headings = {**{name: name for name in data.sources}, "mean": "mean"}
    rows = reports.by_told(records, "dice")
    auc = reports.table(reports.by_told(records, "auc"), headings, "mean")
    reports.show(folder, rows, headings, "Dice by site, %", {"lr": "rate, 1e-3"}, "mean")
    print("AUC, %\n" + auc)
