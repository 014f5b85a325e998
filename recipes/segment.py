"""`python -m recipes segment`: segmentation of domains that training has not met.

An FCN over a timm `features_only` backbone, the whole of it converted: BatchNorm beside SelfNorm at
the end of residual branches and CrossNorm with style crops after residual blocks (at one of them,
with probability .5), which is the setting of Tang et al. (ICCV 2021) for GTA5; `cnsn` is both, each
at its place. CN and CN-X have the source domains as contexts; a target's label is unknown, and
so is a source's except in the column that says otherwise. `bn-frozen` keeps the statistics that all
start with: a control, a network without batch statistics as `cn-x` is one. With no options the data
are made on the spot, see `recipes/common/scenes.py`.

Running statistics start from those of eight batches. The setting was chosen for `bn` on the
validation scenes of the sources; scores are those of the last epoch. A score is intersection over
union, averaged over classes, then over domains: to call everything background scores next to
nothing, as the report says.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

import normswap

from .common import grid, methods, reports
from .common.dense import FCN, predict, start
from .common.options import Parser, count, resolve
from .common.runs import atomic
from .common.scenes import COUNTS, IGNORED, TEST, TRAIN, VALID, Scenes, make_scenes
from .common.scenes_folder import read_scenes, split
from .common.training import Log, check_finite, descend, takes_context, told
from .common.weights import check_model_name

METHODS = ("bn", "crossnorm", "selfnorm", "cnsn", "cn", "cn-x")
STYLE = {"crop": "style", "p": 0.5, "active": 1}
PLACED: dict[str, dict[str, Any]] = {
    "crossnorm": {"placement": "post", **STYLE},
    "selfnorm": {"placement": "residual"},
    "cnsn": {"placement": "residual", "crossnorm_at": "post", **STYLE},
}
TOLD = {
    "source_posterior": "sources, posterior",
    "target_posterior": "targets, posterior",
    "source_known": "sources, label known",
}
SMOKE_COUNTS = (32, 8, 8)
SHOWN = 3  # test scenes of each domain in predictions.png


def run(options: Namespace) -> None:
    check_model_name(options.model)
    resolve(options, backbone=False, batch=16, epochs=1, seeds=1)
    scenes = loader(options)
    for method in options.methods:  # what cannot be converted shows now, not in an hour
        build(method, scenes(0), 0, options)
    given, chosen = (lambda config: scenes(config.seed)), itemgetter("valid")
    folder, records = grid.run(options, "segment", given, train_one, chosen)
    data = scenes(0)
    title = f"sources {', '.join(data.sources)}; targets {', '.join(data.targets)}"
    targets = {f"on_{name}": name for name in data.targets}
    points = {"source": "sources", "target": "targets", **(targets if len(targets) > 1 else {})}
    rows = {m: torch.from_numpy(np.load(masks_of(folder, m))) for m in options.methods}
    draw_predictions(folder / "predictions.png", data, shown(data), rows, "test scenes, seed 0")
    each = {f"on_{name}": name for name in data.sources} | targets
    notes = [
        f"mean IoU, %; {title}; label unknown unless said, and then by the policy of the method",
        reports.table(records, {"valid": "sources, validation", **each}),
        background(data, TEST),
    ]
    reports.show(folder, records, points, title, TOLD, "target", notes, unit="mean IoU, %")


def loader(options: Namespace) -> Callable[[int], Scenes]:
    """Give a function that gives the scenes of a seed."""
    if options.data is not None:
        limit = sum(SMOKE_COUNTS) if options.smoke else None
        read = read_scenes(options.data, options.source, options.target, options.image_size, limit)
        return partial(split, read)
    sources = options.source or ["gravel", "grass"]
    targets = options.target or ["brick", "moon"]
    counts = SMOKE_COUNTS if options.smoke else COUNTS
    return grid.Latest(lambda seed: make_scenes(sources, targets, options.image_size, seed, counts))


def build(method: str, data: Scenes, seed: int, options: Namespace) -> nn.Module:
    """Build the network and convert it; every method starts as the same function."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = islice(data.batches(data.where(TRAIN), options.batch, generator), 8)
    model = start(FCN, options, (pictures for pictures, *_ in batches), classes=data.classes)
    placed = dict(PLACED.get(method, {}))
    if placed and options.placement:
        placed["placement"] = options.placement
        placed.pop("crossnorm_at", None)
    where = {"select": "backbone*"} if placed else {}
    return methods.convert(model, method, data.sources, verify=False, **placed, **where)


def train_one(data: Scenes, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model; give its scores after the last epoch."""
    method, seed = config.method, config.seed
    model = build(method, data, seed, config).to(config.device)
    optimizer = torch.optim.AdamW(normswap.param_groups(model, config.lr, config.weight_decay))
    train = data.where(TRAIN)
    steps = config.epochs * max(len(train) // config.batch, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, pct_start=0.1)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        torch.manual_seed(seed * 1000 + epoch)
        model.train()
        losses = []
        for batch in data.batches(train, config.batch, generator):
            pictures, masks, domains = (tensor.to(config.device) for tensor in batch)
            scores = told(model, pictures, domains)
            loss = F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum")
            loss = loss / (masks != IGNORED).sum().clamp(min=1)
            descend(loss, optimizer)
            schedule.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        check_finite(mean, f"of {method} in epoch {epoch + 1}", config.lr)
        log({"epoch": epoch + 1, "loss": mean, "valid": evaluate(model, data, VALID)["source"]})
    figures = {"valid": evaluate(model, data, VALID)["source"]}
    if not config.final:
        return figures
    figures |= evaluate(model, data, TEST)
    if seed == 0:
        with atomic(masks_of(config.folder, method)) as temporary, temporary.open("wb") as file:
            np.save(file, classes_of(model, data.images[shown(data)]).numpy())
    if takes_context(model):
        figures["source_known"] = evaluate(model, data, TEST, known=True)["source"]
        normswap.set_unknown(model, "posterior")
        found = evaluate(model, data, TEST)
        figures |= {f"{key}_posterior": found[key] for key in ("source", "target")}
    return figures


def shown(data: Scenes) -> Tensor:
    """Give the scenes that predictions.png shows."""
    domains = range(len(data.sources) + len(data.targets))
    return torch.cat([data.where(TEST, domain)[:SHOWN] for domain in domains])


def masks_of(folder: Path, method: str) -> Path:
    """Give the file with a method's masks of the scenes shown."""
    return folder / f"masks-{method}.npy"


def mean_iou(truth: Tensor, found: Tensor) -> float:
    """Give the mean of intersection over union of the classes that occur or were found, in %."""
    known = truth != IGNORED
    return 100 * float(jaccard_score(truth[known], found[known], average="macro"))


def classes_of(model: nn.Module, images: Tensor, context: Tensor | None = None) -> Tensor:
    """Give the classes (N, H, W) uint8 of uint8 images, with or without their contexts."""
    return predict(model, images, context, lambda scores: scores.argmax(1).to(torch.uint8))


def evaluate(model: nn.Module, data: Scenes, part: int, known: bool = False) -> dict[str, float]:
    """Give the mean IoU of each domain that has the part, and by kind; `known`: sources told."""
    scores: dict[str, float] = {}
    names = data.sources if known else [*data.sources, *data.targets]
    for domain, name in enumerate(names):
        chosen = data.where(part, domain)
        if len(chosen):
            found = classes_of(model, data.images[chosen], data.domains[chosen] if known else None)
            scores[f"on_{name}"] = mean_iou(data.masks[chosen], found)
    for kind, names in (("source", data.sources), ("target", data.targets)):
        if values := [scores[f"on_{name}"] for name in names if f"on_{name}" in scores]:
            scores[kind] = sum(values) / len(values)
    return scores


def background(data: Scenes, part: int) -> str:
    """Say what calling everything background scores on a part."""
    lines = []
    for domain, name in enumerate((*data.sources, *data.targets)):
        truth = data.masks[data.where(part, domain)]
        score = mean_iou(truth, torch.zeros_like(truth))
        pixels = 100 * (truth[truth != IGNORED] == 0).float().mean().item()
        lines.append(f"{name}: {pixels:.1f} % of pixels, mean IoU {score:.1f} %")
    return "everything called class 0: " + "; ".join(lines)


def draw_predictions(
    path: Path, data: Scenes, scenes: Tensor, rows: dict[str, Tensor], title: str
) -> None:
    """Draw images, truth, and what each method found, a column a scene."""
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    # Around the wheel, neighbours apart; white where no class is known.
    hues = [(0.381966 * i % 1, 0.75, 1.0 - 0.25 * (i % 2)) for i in range(data.classes - 1)]
    colours = torch.ones(256, 3)
    colours[: data.classes] = torch.tensor([(0.0, 0.0, 0.0), *map(tuple, hsv_to_rgb(hues))])
    shown = {"truth": data.masks[scenes], **rows}
    pictures = {name: colours[masks.long()].permute(0, 3, 1, 2) for name, masks in shown.items()}
    pictures = {"image": data.images[scenes] / 255, **pictures}
    size = (1.1 * len(scenes) + 1.2, 1.1 * len(pictures) + 0.6)
    canvas = Figure(figsize=size, dpi=120, layout="constrained")
    axes = canvas.subplots(len(pictures), squeeze=False)[:, 0]
    for axis, (name, images) in zip(axes, pictures.items(), strict=True):
        axis.imshow(make_grid(images, len(scenes), pad_value=1).permute(1, 2, 0).numpy())
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    names = (*data.sources, *data.targets)
    titles = dict.fromkeys(names[int(domain)] for domain in data.domains[scenes])
    canvas.suptitle(f"{title}: {', '.join(titles)}", fontsize=9)
    with atomic(path) as temporary:
        canvas.savefig(temporary, format="png", bbox_inches="tight")


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS, methods.known())
    parser.share("pretrained", "tune", model="resnet10t", image_size=64, epochs=8, lr=3e-3)
    parser.share(weight_decay=0.05)
    add = parser.add_argument
    add("--data", type=Path, help="DOMAIN/images/NAME.png, DOMAIN/masks/NAME.png")
    add("--source", nargs="+", help="domains to train on (gravel grass)")
    add("--target", nargs="+", help="domains to test on (brick moon)")
    add("--levels", nargs="+", type=int, default=[1, 2, 3], help="feature maps, finest first")
    add("--placement", help="of crossnorm, selfnorm and cnsn, for theirs")
    add("--batch", type=count, default=16, help="images a step")
