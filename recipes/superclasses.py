"""`python -m recipes superclasses`: what a superclass label is worth, leaked at test time and not.

Context normalization was published with superclasses of the target as contexts, and the true
superclass fed at test time: a part of the answer. This recipe sets beside that protocol what it
hides. Columns, all of one training each:

    LEAKY          the true superclass of each test image is fed: not to be had in use
    from image     the context that an assigner reads off the test image (k-means): to be had
    pooled         no label: one Gaussian for the mixture of contexts
    posterior      no label: contexts weighed by how well they explain the image
    no context     of a model that takes none

`bn + mask` is what the leak is worth without any method: BatchNorm's predictions, restricted to the
classes of the true superclass; `cn-superclass + mask` shows whether the method adds to that.
k-means runs on training images alone, over pixels, or over features of the given weights before
they are tuned. Every method has the same start, images, order, epochs and rate; figures are those
of the last epoch, nothing is chosen on test images.

The default, five methods and three seeds, takes two to three minutes of one thread.
The digits train on ten of each class, since BatchNorm leaves hardly an error with all of them.
Superclasses of the digits, as arbitrary as any: round 0 6 8 9, straight 1 4 7, curved 2 3 5. Of
PACS: animals and others. `--superclasses cifar100` knows CIFAR-100's; NAME=CLASS,CLASS ... yours.
Source of the protocol: Faye et al., arXiv 2403.16798, and its notebooks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

import normswap

from . import grid, images
from .data import TEST_BATCH, DomainData, Loader
from .finetune import pick_device
from .points import draw_points
from .supergroups import DIGITS, PACS, with_clusters, with_superclasses

# Few enough that BatchNorm leaves errors, which a leak can mend: with 126 a class it makes few.
DIGITS_PER_CLASS, DIGITS_EPOCHS = 10, 60
# Each method: what replaces BatchNorm, and where contexts come from.
METHODS = {
    "bn": ("bn", "superclass"),
    "cn-superclass": ("cn", "superclass"),
    "cn-x-superclass": ("cn-x", "superclass"),
    "cn-kmeans": ("cn", "kmeans"),
    "cn-x-kmeans": ("cn-x", "kmeans"),
}
FIGURES = {
    "plain": "no context",
    "leaky": "LEAKY: true superclass",
    "assigned": "from image",
    "pooled": "pooled",
    "posterior": "posterior",
}


def main(argv: list[str]) -> int:
    """Run the recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    return grid.command(_parser(), run, argv)


def run(options: argparse.Namespace) -> None:
    """Train every method with every seed, and tabulate."""
    if options.data is None and options.train_per_class is None:
        options.train_per_class = DIGITS_PER_CLASS
    images.resolve(options, digits_epochs=DIGITS_EPOCHS)
    device = pick_device(options.device)
    if options.superclasses is None:
        options.superclasses = list(DIGITS if options.data is None else PACS)

    @lru_cache(maxsize=1)  # the seed is the outer loop
    def data_of(seed: int) -> DomainData:
        return with_superclasses(images.load(options, seed), options.superclasses)

    # What is wrong with images, model or weights is said before a run is made.
    images.build(options, data_of(0), images.settings(options, 0), device)
    options.clusters = options.clusters or len(data_of(0).domain_names)
    folder = grid.open_run(options, "superclasses")
    cells = grid.cells(options)

    def train(cell: grid.Cell, log: grid.Log) -> dict[str, Any]:
        return train_one(cell, data_of(cell["seed"]), options, device, log)

    records = grid.run_cells(folder, cells, train)
    rows = [*records, *masked(records)]
    title = f"superclasses as contexts: {options.model}, {options.image_size} px"
    draw_points(folder / "results.png", rows, "method", FIGURES, title)
    text = "test accuracy, %; mean +- standard deviation over seeds\n\n"
    text += grid.table(rows, ["method"], FIGURES)
    for record in records:
        if "clusters" in record and record["cell"]["seed"] == 0:
            text += f"\n\n{record['cell']['method']}, seed 0: {record['clusters']}"
    grid.finish(folder, text)


def train_one(
    cell: grid.Cell,
    data: DomainData,
    options: argparse.Namespace,
    device: torch.device,
    log: grid.Log,
) -> dict[str, Any]:
    """Train one model; give its accuracies in per cent, by what it is told at test time."""
    norms, source = METHODS[cell["method"]]
    config = images.settings(options, cell["seed"])
    superclasses = data.domains
    member = torch.zeros(len(data.domain_names), len(data.classes), dtype=torch.bool)
    member[superclasses, data.labels] = True
    model, loader = images.build(options, data, config, device)
    figures: dict[str, Any] = {}
    if source == "kmeans":
        data, figures["clusters"] = with_clusters(
            loader, _features(options, model), options.clusters, cell["seed"]
        )
        loader.data = data
    if norms != "bn":
        example = loader.batch(loader.train_indices[:2]).images
        names = data.domain_names
        model = normswap.convert(model, norms, contexts=names, example_inputs=(example,))
    images.train(cell["method"], model, loader, config, log)

    def accuracy(context: Tensor | None, mask: bool = False, unknown: str = "pooled") -> float:
        scores = logits(model, loader, context, unknown)
        if mask:
            scores = scores.masked_fill(~member[superclasses[data.test]], -torch.inf)
        return 100 * (scores.argmax(1) == data.labels[data.test]).float().mean().item()

    if norms == "bn":
        return {"plain": accuracy(None), "masked": accuracy(None, mask=True)}
    given = data.domains[data.test]
    if source == "superclass":
        figures |= {"leaky": accuracy(given), "masked": accuracy(given, mask=True)}
    else:
        figures["assigned"] = accuracy(given)
    for unknown in ("pooled", "posterior"):
        figures[unknown] = accuracy(None, unknown=unknown)
    return figures


@torch.inference_mode()
def logits(model: nn.Module, loader: Loader, context: Tensor | None, unknown: str) -> Tensor:
    """Give the scores of the test images, on the CPU.

    Args:
        model: converted or not.
        loader: of the images.
        context: labels (tests,), or None, which a model without contexts needs.
        unknown: what None means to the norms.
    """
    model = copy.deepcopy(model).eval()
    layers = [
        m for m in model.modules() if isinstance(m, (normswap.ContextNorm, normswap.ContextNormX))
    ]
    for layer in layers:
        layer.unknown = unknown
    found = []
    indices = loader.data.test.nonzero().flatten()
    for part, some in enumerate(indices.split(TEST_BATCH)):
        batch = loader.batch(some).images
        told = {}
        if context is not None:
            told["context"] = context.split(TEST_BATCH)[part].to(batch.device)
        found.append(model(batch, **told).cpu())
    return torch.cat(found)


def masked(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make rows of the accuracies within the classes of the true superclass."""
    return [
        {"cell": {**r["cell"], "method": f"{r['cell']['method']} + mask"}, "leaky": r["masked"]}
        for r in records
        if "masked" in r
    ]


def _features(options: argparse.Namespace, model: nn.Module) -> nn.Module | Literal["pixels"]:
    """Give what k-means looks at: the given weights' features; pixels, where there are none."""
    return "pixels" if options.weights == images.SCRATCH else model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes superclasses", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    grid.add_arguments(parser, tuple(METHODS), tuple(METHODS), seeds=3)
    images.add_arguments(parser)
    parser.add_argument(
        "--superclasses", nargs="+", metavar="NAME=CLASS,CLASS",
        help="or cifar100 (default: see above)",
    )  # fmt: skip
    parser.add_argument(
        "--clusters", type=grid.count, help="of k-means (default: as many as superclasses)"
    )
    return parser
