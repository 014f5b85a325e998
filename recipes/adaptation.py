"""`python -m recipes adaptation`: a labelled source, an unlabelled target, as two contexts.

AdaMatch (Berthelot et al., ICLR 2022, arXiv 2106.04732): cross-entropy on weak and strong views of
the source, and on strong views of the target with the model's own predictions on the weak ones,
aligned with the source's share of classes; those count whose confidence is at least --threshold
times the mean confidence on the source, with a weight that grows from 0 to 1 over the first half.
All views are one batch. Where the batch's other half changes the source's logits (bn and all
methods without contexts), these are also computed from the source alone and the two interpolated at
random, each logit by itself; with contexts the two are equal.

CN and CN-X take contexts "source" and "target", and are tested on target images as `target` (the
domain of a test image is taken as given: that is the task) and with the context unknown. In
`source-only` the model with BatchNorm takes as many steps on the source alone; --methods knows also
NAME-frozen, see `recipes.frozen`. Target images that test are not adapted to, and class labels of
target images are only counted with.

Without --data: scikit-learn's handwritten digits at two angles, each training digit at one of them,
24 px, and a narrow ResNet-10-T from scratch (conversion after the first batches of both domains
gave its norms statistics). The paper's threshold is 0.9; 0.8 keeps more labels in so few steps.
"""

from __future__ import annotations

import argparse
import math
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
from .pseudo import Alignment, draw, pseudo_loss
from .training import takes_context

METHODS = ("source-only", "bn", "cn", "cn-x")
PLAIN = ("source-only", "bn")
KNOWN = (*PLAIN, *normswap.methods(), *map(frozen.suffixed, (*PLAIN, "cn")))
SOURCE, TARGET = 0, 1
CONTEXTS = ("source", "target")
ACCURACIES = {
    "plain": "target, takes no context",
    "known": "target, context: target",
    "pooled": "target, unknown: pooled",
    "posterior": "target, unknown: posterior",
    "source": "source",
}


def main(argv: list[str]) -> int:
    """Run the recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    return grid.command(_parser(), run, argv)


def run(options: argparse.Namespace) -> None:
    """Train every method with every seed, and tabulate."""
    shared.resolve(options)
    device = pick_device(options.device)
    data = load(options)
    shared.check(options, data)
    folder = grid.open_run(options, "adaptation")
    for domain, name in enumerate(data.domain_names):
        images = data.domains == domain
        print(
            f"{CONTEXTS[domain]} {name}: {int((images & data.train).sum()):,} training and "
            f"{int((images & data.test).sum()):,} test images of {options.image_size} px"
        )
    cells = grid.cells(options)
    records = grid.run_cells(
        folder, cells, lambda cell, log: train_one(cell, data, options, device, log)
    )
    title = f"{data.domain_names[SOURCE]} to {data.domain_names[TARGET]}"
    draw_points(folder / "results.png", records, "method", ACCURACIES, title)
    headings = {**ACCURACIES, "kept": "pseudo-labels kept, %", "right": "of them right, %"}
    grid.finish(folder, grid.table(records, ["method"], headings))


def load(options: argparse.Namespace) -> DomainData:
    """Load the two domains, the source first.

    Raises:
        RecipeError: if they are not named, or are one.
    """
    names = (options.source, options.target)
    if options.data is None:
        names = tuple(name or default for name, default in zip(names, ("0", "45"), strict=True))
        options.source, options.target = names
        if not all(name.removeprefix("-").isdecimal() for name in names):
            raise RecipeError(
                f"expected --source and --target as angles, got {' and '.join(names)}"
            )
    if None in names or names[SOURCE] == names[TARGET]:
        raise RecipeError(f"expected --source and --target to be two domains, got {names}")
    angles = [int(name) for name in names] if options.data is None else ()
    return shared.load(options, angles, domains=names)


def train_one(
    cell: grid.Cell,
    data: DomainData,
    options: argparse.Namespace,
    device: torch.device,
    log: grid.Log,
) -> dict[str, Any]:
    """Train one model; give its accuracies on the test images, and those of its pseudo-labels."""
    seed, size = cell["seed"], options.batch_size
    generator = torch.Generator().manual_seed(seed)
    parts = [(data.train & (data.domains == d)).nonzero().flatten() for d in (SOURCE, TARGET)]
    sources = draw(parts[SOURCE], size, options.steps, generator)
    targets = draw(parts[TARGET], size * options.ratio, options.steps, generator)

    model = shared.build(options, len(data.classes), seed).to(device)
    views = shared.make_views(model, data, device)
    if options.weights is None:
        # Norms that learn their statistics would otherwise start from those of no data.
        start = torch.Generator().manual_seed(seed)
        mixed = [torch.cat(pair) for pair in zip(sources[:8], targets[:8], strict=True)]
        batches = [views.weak(part, start) for part in mixed]
        normswap.update_stats(model, batches, progress=False)
    model = shared.converted(model, cell["method"], CONTEXTS, views.plain(parts[0][:2]), PLAIN)
    align = Alignment(len(data.classes))

    def step(model: nn.Module, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        ours, others = sources[index], targets[index]
        labels = data.labels[ours].to(device).repeat(2)
        known = torch.cat([views.weak(ours, generator), views.strong(ours, generator)])
        if frozen.name_of(cell["method"]) == "source-only":
            return F.cross_entropy(model(known), labels), {}
        images = [known, views.weak(others, generator), views.strong(others, generator)]
        source, weak, strong = shared.forward(model, images, (SOURCE, TARGET, TARGET))
        if not takes_context(model):
            alone = without_trace(model, known)
            source = alone.lerp(source, torch.rand(source.shape).to(source))
        confident = source[: len(ours)].detach().softmax(1)
        threshold = options.threshold * confident.max(1).values.mean()
        aligned = align(confident, weak.detach().softmax(1))
        pseudo = pseudo_loss(aligned, strong, threshold, one_hot=False)
        right = (pseudo.labels == data.labels[others].to(device))[pseudo.kept]
        figures = {"kept": 100 * pseudo.kept.float().mean(), "right": 100 * right.float().mean()}
        weight = 0.5 - 0.5 * math.cos(min(math.pi, 2 * math.pi * index / options.steps))
        return F.cross_entropy(source, labels) + weight * pseudo.loss, figures

    model, figures = shared.train(model, step, options, seed, log)
    accuracy = {}
    for domain in (SOURCE, TARGET):
        test = (data.test & (data.domains == domain)).nonzero().flatten()
        accuracy[domain] = shared.evaluate(model, views, test, domain)
    source = accuracy[SOURCE].get("known", accuracy[SOURCE].get("plain"))
    return {**accuracy[TARGET], "source": source, **figures}


def without_trace(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in training once more, on copies of its buffers: statistics count one forward."""
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, copies, (images,))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes adaptation", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder DOMAIN/CLASS/image")
    parser.add_argument("--source", help="domain with labels; an angle for the digits (0)")
    parser.add_argument("--target", help="domain without; an angle for the digits (45)")
    grid.add_arguments(parser, METHODS, KNOWN, seeds=3)
    shared.add_arguments(parser, steps=500, batch=32)
    parser.add_argument(
        "--ratio", type=grid.count, default=1, help="target images a source image (default: 1)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="of the source's confidence (default: 0.8)"
    )
    return parser
