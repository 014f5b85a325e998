"""`python -m recipes fixmatch`: a few labels a class, and many images without.

FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685): cross-entropy on weak views of the labelled
images, and on strong views of the unlabelled ones with the model's own confident predictions on
their weak views. All views are one batch. BatchNorm beside CNSN, and CN and CN-X with two contexts,
"labelled" and "unlabelled": tested as `unlabelled`, since test images are like the unlabelled ones
(this needs no test label), and with the context unknown. In `labels-only` the model with BatchNorm
takes as many steps on the labelled images alone, on their weak and their strong views, so that what
the unlabelled images bring is not mistaken for what the augmentation brings; --methods knows also
NAME-frozen, see `recipes.frozen`.

The unlabelled images are all training images, the labelled among them; seeds differ in which are
labelled, the initial weights and the batches. True labels of unlabelled images are only counted.
Without --data: scikit-learn's handwritten digits at 24 px and a narrow ResNet-10-T from scratch
(conversion after the first batches gave its norms statistics). With it, a folder CLASS/image or
DOMAIN/CLASS/image, whose domains are then mixed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

from . import frozen, grid
from . import unlabelled as shared
from .data import DomainData
from .errors import RecipeError
from .finetune import pick_device
from .points import draw_points
from .pseudo import draw, pseudo_loss

METHODS = ("labels-only", "bn", "cnsn", "cn", "cn-x")
PLAIN = ("labels-only", "bn")
KNOWN = (*PLAIN, *normswap.methods(), *map(frozen.suffixed, (*PLAIN, "cn")))
LABELLED, UNLABELLED = 0, 1
CONTEXTS = ("labelled", "unlabelled")
ACCURACIES = {
    "plain": "takes no context",
    "known": "context: unlabelled",
    "pooled": "unknown: pooled",
    "posterior": "unknown: posterior",
}


def main(argv: list[str]) -> int:
    """Run the recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    return grid.command(_parser(), run, argv)


def run(options: argparse.Namespace) -> None:
    """Train every method with every seed, and tabulate."""
    shared.resolve(options)
    device = pick_device(options.device)
    data = shared.load(options, angles=(0,), domains=options.domains, flat=True)
    pick_labelled(data, options.labels, seed=0)
    shared.check(options, data)
    folder = grid.open_run(options, "fixmatch")
    print(
        f"{len(data.classes)} classes, {options.labels} labels each; {int(data.train.sum()):,} "
        f"training and {int(data.test.sum()):,} test images of {options.image_size} px"
    )
    cells = grid.cells(options)
    records = grid.run_cells(
        folder, cells, lambda cell, log: train_one(cell, data, options, device, log)
    )
    title = f"FixMatch, {options.labels} labels a class"
    draw_points(folder / "results.png", records, "method", ACCURACIES, title)
    headings = {**ACCURACIES, "kept": "pseudo-labels kept, %", "right": "of them right, %"}
    grid.finish(folder, grid.table(records, ["method"], headings))


def pick_labelled(data: DomainData, per_class: int, seed: int) -> Tensor:
    """Pick so many training images of each class at random; give their indices.

    Raises:
        RecipeError: if a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = []
    for label, name in enumerate(data.classes):
        members = (data.train & (data.labels == label)).nonzero().flatten()
        if len(members) < per_class:
            raise RecipeError(
                f"expected --labels of at most {len(members)}, the training images of class "
                f"{name!r}, got {per_class}"
            )
        picked.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(picked)


def train_one(
    cell: grid.Cell,
    data: DomainData,
    options: argparse.Namespace,
    device: torch.device,
    log: grid.Log,
) -> dict[str, Any]:
    """Train one model; give its accuracies on the test images, and those of its pseudo-labels."""
    seed = cell["seed"]
    generator = torch.Generator().manual_seed(seed)
    size = options.batch_size
    labelled = draw(pick_labelled(data, options.labels, seed), size, options.steps, generator)
    every = data.train.nonzero().flatten()
    unlabelled = draw(every, size * options.ratio, options.steps, generator)

    model = shared.build(options, len(data.classes), seed).to(device)
    views = shared.make_views(model, data, device)
    if options.weights is None:
        # Norms that learn their statistics would otherwise start from those of no data.
        start = torch.Generator().manual_seed(seed)
        batches = [views.weak(part, start) for part in unlabelled[:8]]
        normswap.update_stats(model, batches, progress=False)
    model = shared.converted(model, cell["method"], CONTEXTS, views.plain(every[:2]), PLAIN)

    def step(model: nn.Module, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        ours, others = labelled[index], unlabelled[index]
        targets = data.labels[ours].to(device)
        images = views.weak(ours, generator)
        if frozen.name_of(cell["method"]) == "labels-only":
            images = torch.cat([images, views.strong(ours, generator)])
            return F.cross_entropy(model(images), targets.repeat(2)), {}
        parts = [images, views.weak(others, generator), views.strong(others, generator)]
        known, weak, strong = shared.forward(model, parts, (LABELLED, UNLABELLED, UNLABELLED))
        pseudo = pseudo_loss(weak.softmax(1), strong, options.threshold, one_hot=True)
        right = (pseudo.labels == data.labels[others].to(device))[pseudo.kept]
        figures = {"kept": 100 * pseudo.kept.float().mean(), "right": 100 * right.float().mean()}
        return F.cross_entropy(known, targets) + options.share * pseudo.loss, figures

    model, figures = shared.train(model, step, options, seed, log)
    test = data.test.nonzero().flatten()
    return {**shared.evaluate(model, views, test, UNLABELLED), **figures}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes fixmatch", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder CLASS/image or DOMAIN/CLASS/image")
    parser.add_argument("--domains", nargs="+", help="of the folder, those to use (all)")
    grid.add_arguments(parser, METHODS, KNOWN, seeds=3)
    shared.add_arguments(parser, steps=800, batch=20)
    parser.add_argument("--labels", type=grid.count, default=4, help="a class (default: 4)")
    parser.add_argument(
        "--ratio", type=grid.count, default=3, help="unlabelled images a labelled one (default: 3)"
    )
    parser.add_argument("--threshold", type=float, default=0.95, help="(default: 0.95)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="weight of the unlabelled loss (default: 1)"
    )
    return parser
