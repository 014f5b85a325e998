"""`python -m recipes multisite`: vessels of the retina from cameras that differ, the camera known.

A U-Net (Ronneberger et al., MICCAI 2015) over a timm `features_only` backbone trains on patches of
the images of all sites together; the site is the context. Tested are whole images of each site,
told the site, or not. A site's Dice is the mean over its images, its AUC is over all their pixels,
neither with a mask of the field of view.

Of `bn-frozen` the backbone keeps the statistics of the given weights.

With --adapt SITE it trains on that site alone, and is tested on the others as it is, and `adapted`
to their training images, without masks: BatchNorm by statistics estimated anew (AdaBN), methods
with contexts by one that is added, which leaves the answers for the site's own images as they were.

The model tested is the moving average of the weights after the last step. --tune chooses by the
last fifth of the training images.
"""

import copy
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import normswap

from .common import grid, methods, reports, scores
from .common.dense import UNet, predict, start
from .common.errors import check, check_names
from .common.options import Parser, count, of_cell, resolve
from .common.scenes import IGNORED, TEST, TRAIN, VALID, Scenes
from .common.scenes_folder import read_sites
from .common.training import LARGE, Log, Loss, fit, takes_context, told
from .common.weights import EFFICIENTNET_LITE0, NARROW, SCRATCH

TRAINING = TRAIN, VALID
METHODS = ("bn", "cn", "cn-first", "cn-x", "cn-x-batch")
FILL, ADAPT = 8, 32  # batches that give new norms their statistics, and that a site is adapted to
WHOLE = 4  # whole images a forward


def run(options: Namespace) -> None:
    check(options.data, "expected --data, a folder or zip SITE/{train,test}/{images,masks}")
    if options.model is None and options.weights != EFFICIENTNET_LITE0:
        options.model = NARROW
    resolve(options, steps=2, batch_size=4, image_size=64, patch=32, limit=5)
    fits = options.patch <= options.image_size
    check(fits, f"expected --patch of at most {options.image_size}, got {options.patch}")
    data, home = read_sites(options.data, options.image_size, options.limit), options.adapt
    if home is not None:
        check_names("--adapt to be one of the sites", [home], data.sources)
        frozen = [m for m in options.methods if m.endswith(methods.FROZEN)]
        check(not frozen, f"expected methods that adapt with --adapt, got {', '.join(frozen)}")
    for method in options.methods:  # what cannot be converted is said before a run is made
        build(of_cell(options, method=method, seed=0), data)
    chosen = scores.known_mean
    folder, records = grid.run(options, "multisite", lambda _: data, train_one, chosen)
    headings = {name: name for name in data.sources if name != home} | {"mean": "mean"}
    aside = {f"auc_{name}": f"AUC {name}" for name in data.sources}
    aside = aside if home is None else {home: f"{home}, its own"}
    rows, unit = scores.rows_by_told(records), "Dice, %"
    reports.show(folder, rows, headings, "Dice of vessels, %", aside, "mean", unit=unit)


def contexts_of(config: Namespace, data: Scenes) -> list[str]:
    return data.sources if config.adapt is None else [config.adapt]


def build(config: Namespace, data: Scenes) -> nn.Module:
    """Build the network and convert it; by seed every method starts as the same function."""
    torch.manual_seed(config.seed)
    names = contexts_of(config, data)
    fill = [patches(data, names, TRAINING, config, seed)[0] for seed in range(FILL)]
    keep = config.pretrained or config.weights != SCRATCH
    model = start(UNet, config, fill, keep, weights=config.weights)
    if config.method.endswith(methods.FROZEN):  # the decoder is new: it has nothing to keep
        methods.convert(model.backbone, config.method, None)
        return model
    return methods.convert(model, config.method, names, verify=False)


def patches(
    data: Scenes, names: Sequence[str], parts: Sequence[int], config: Namespace, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a batch of patches of parts of these sites, mirrored at random: pixels, masks, sites."""
    chosen = torch.cat([data.where(p, data.sources.index(name)) for p in parts for name in names])
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(seed))
    size, line = config.batch_size, torch.arange(config.patch)
    picked = chosen[draw(len(chosen), (size,))]
    rows, columns = (draw(s - config.patch + 1, (size, 1)) + line for s in data.masks.shape[1:])
    columns = torch.where(draw(2, (size, 1)) == 1, columns.flip(1), columns)
    at = picked[:, None, None], rows[:, :, None], columns[:, None, :]
    pictures = data.images.permute(0, 2, 3, 1)[at].permute(0, 3, 1, 2).float() / 255
    return pictures, data.masks[at].long(), data.domains[picked]


def train_one(data: Scenes, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model; give its Dice in per cent, by what it is told, by site."""
    model = build(config, data).to(config.device, memory_format=torch.channels_last)
    names, labelled = contexts_of(config, data), takes_context(model)
    parts, part = (TRAINING, TEST) if config.final else ((TRAIN,), VALID)

    def step(model: nn.Module, index: int) -> Loss:
        batch = patches(data, names, parts, config, config.seed * LARGE + index)
        pictures, masks, sites = (t.to(config.device) for t in batch)
        sites = sites if len(names) > 1 else torch.zeros_like(sites)
        found = told(model, pictures, sites).float()
        inside, vessels = masks != IGNORED, masks == 1
        likely = found.softmax(1)[:, 1] * inside
        dice = (2 * (likely * vessels).sum() + 1) / (likely.sum() + vessels.sum() + 1)
        return F.cross_entropy(found, masks, ignore_index=IGNORED) + 1 - dice, {}

    model, figures = fit(model, step, config, log)
    find = partial(probabilities, data=data, part=part)
    if config.adapt is not None and config.final:
        return {**figures, **adapted(model, data, config, find)}

    def measure(model: nn.Module, label: scores.Label | None) -> dict[str, float]:
        return {name: dice_of(*find(model, name if label else None, name)) for name in names}

    found = scores.by_told(model, measure, scores.EVERY if config.final else ())
    if not config.final:
        return {**figures, "accuracy": found}
    first, more = next(iter(found)), {}
    for name in data.sources:
        likely, truth = find(model, name if labelled else None, name)
        inside = truth != IGNORED
        more[f"auc_{name}"] = 100 * roc_auc_score(truth[inside], likely[inside])
    return {**figures, "accuracy": found, "more": {first: more}}


def adapted(model: nn.Module, data: Scenes, config: Namespace, find: Any) -> dict[str, Any]:
    """Adapt a model to each other site; give its Dice before and after, there and at home."""
    home, labelled = config.adapt, takes_context(model)

    def dice(model: nn.Module, context: str, site: str) -> float:
        return dice_of(*find(model, context if labelled else None, site))

    others = [name for name in data.sources if name != home]
    before, after, own = {name: dice(model, home, name) for name in others}, {}, []
    for name in others:
        changed = copy.deepcopy(model)
        seen = [patches(data, [name], TRAINING, config, seed)[0] for seed in range(ADAPT)]
        if labelled:
            normswap.add_context(changed, name, like=home)
            normswap.adapt(changed, seen, name, progress=False)
        else:
            normswap.update_stats(changed, seen, progress=False)
        after[name] = dice(changed, name, name)
        own.append(dice(changed, home, home))
    more = {"": {home: dice(model, home, home)}, "adapted": {home: mean(own)}}
    return {"accuracy": {"": before, "adapted": after}, "more": more}


def probabilities(
    model: nn.Module, context: str | None, site: str, data: Scenes, part: int
) -> tuple[Tensor, Tensor]:
    """Give how likely each pixel is a vessel's, of the images of a part of a site, and masks."""
    chosen = data.where(part, data.sources.index(site))
    likely = predict(model, data.images[chosen], context, lambda s: s.softmax(1)[:, 1], WHOLE)
    return likely, data.masks[chosen]


def dice_of(likely: Tensor, masks: Tensor) -> float:
    found, truth = (likely > 0.5) & (masks != IGNORED), masks == 1
    both, sizes = ((found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2)))
    return float((200 * both / sizes.clamp(min=1)).mean())


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS, (*METHODS, "bn-frozen"))
    parser.share("model", "pretrained", "tune", "amp", weights=SCRATCH, image_size=320, lr=3e-3)
    parser.share(steps=200, batch_size=8, weight_decay=0.05, ema=0.98)
    add = parser.add_argument
    add("--data", type=Path, help="SITE/{train,test}/{images,masks}; it has no default")
    add("--limit", type=count, metavar="N", help="images of each part of each site")
    add("--adapt", metavar="SITE", help="train on this site alone, and adapt to the others")
    add("--patch", type=count, default=64, help="pixels a side of what trains")
    add("--levels", nargs="+", type=int, default=[0, 1, 2, 3], help="feature maps, finest first")
