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
they are tuned. Figures are those of the last epoch.

The default, five methods and three seeds, takes two to three minutes of one thread.
The digits train on ten of each class, since BatchNorm leaves hardly an error with all of them.
Superclasses of the digits, as arbitrary as any: round 0 6 8 9, straight 1 4 7, curved 2 3 5. Of
PACS: animals and others. `--superclasses cifar100` knows CIFAR-100's; NAME=CLASS,CLASS ... yours.
Source of the protocol: Faye et al., arXiv 2403.16798, and its notebooks.
"""

import copy
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

import normswap

from .common import grid, images, methods, reports, scores
from .common.data import TEST_BATCH, DomainData, Loader, validation
from .common.errors import check
from .common.options import Parser
from .common.training import Log, train
from .common.weights import SCRATCH

# Few enough that BatchNorm leaves errors, which a leak can mend: with 126 a class it makes few.
DIGITS_PER_CLASS, DIGITS_EPOCHS = 10, 60
DIGITS = ("round=0,6,8,9", "straight=1,4,7", "curved=2,3,5")
PACS = ("animals=dog,elephant,giraffe,horse", "others=guitar,house,person")
# What replaces BatchNorm, and where its contexts come from.
METHODS = ("bn", "cn-superclass", "cn-x-superclass", "cn-kmeans", "cn-x-kmeans")
FIGURES = {
    "plain": "no context",
    "leaky": "LEAKY: true superclass",
    "assigned": "from image",
    "pooled": "pooled",
    "posterior": "posterior",
}


def run(options: Namespace) -> None:
    digits = options.data is None
    if digits and options.train_per_class is None:
        options.train_per_class = DIGITS_PER_CLASS
    images.settle(options)
    options.superclasses = options.superclasses or list(DIGITS if digits else PACS)

    def data_of(config: Namespace) -> DomainData:
        return with_superclasses(images.load_mixed(config, config.seed), config.superclasses)

    before = partial(images.build, options, seed=0)
    folder, records = grid.run(options, "superclasses", data_of, train_one, told, before=before)
    rows = [*records, *masked(records)]
    title = f"superclasses as contexts: {options.model}, {options.image_size} px"
    notes = ["test accuracy, %; mean +- standard deviation over seeds"]
    for record in records:
        if "clusters" in record and record["cell"]["seed"] == 0:
            notes.append(f"{record['cell']['method']}, seed 0: {record['clusters']}")
    reports.show(folder, rows, FIGURES, title, notes=notes)


def train_one(data: DomainData, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model; give its accuracies in per cent, by what it is told at test time."""
    norms = config.method.removesuffix("-superclass").removesuffix("-kmeans")
    data = data if config.final else validation(data)
    model, loader, _ = images.build(config, data, config.seed)
    test = loader.test_indices()
    figures: dict[str, Any] = {}
    clustered = config.method.endswith("-kmeans")
    if clustered:
        seen = "pixels" if config.weights == SCRATCH else model
        clusters = len(data.domain_names)
        loader.data, figures["clusters"] = with_clusters(loader, seen, clusters, config.seed)
    names, inputs = loader.data.domain_names, (images.example(loader),)
    model = methods.convert(model, norms, names, example_inputs=inputs)
    train(config.method, model, loader, config, log)
    found = scores.by_label(model, loader, test)
    if clustered:
        found["assigned"] = found.pop("known")
    else:
        found["leaky"] = found.pop("known", None)
        # Predictions within the classes of each image's superclass.
        inside = torch.zeros(len(data.domain_names), len(data.classes), dtype=torch.bool)
        inside[data.domains, data.labels] = True
        told = None if norms == "bn" else scores.own
        given, labels = scores.logits(model, loader, test, told)
        given = given.masked_fill(~inside[data.domains[test]].to(given.device), -torch.inf)
        figures["masked"] = 100 * int((given.argmax(1) == labels).sum()) / len(test)
    return {**{k: v for k, v in found.items() if v is not None}, **figures}


def told(record: dict[str, Any]) -> float:
    """Give the accuracy in per cent of a model told the context, if it takes one."""
    return next(record[key] for key in ("plain", "leaky", "assigned") if key in record)


def masked(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make rows of the accuracies within the classes of the true superclass."""
    return [
        {"cell": {**r["cell"], "method": f"{r['cell']['method']} + mask"}, "leaky": r["masked"]}
        for r in records
        if "masked" in r
    ]


def with_superclasses(data: DomainData, given: Sequence[str]) -> DomainData:
    mapping: str | dict[str, str] = {}
    for text in () if list(given) == ["cifar100"] else given:
        name, equals, members = text.partition("=")
        for member in members.split(","):
            check(
                name and equals and member in data.classes and member not in mapping,
                "expected --superclasses NAME=CLASS,CLASS ... with each class of the data once, "
                f"got {text!r}; the classes are {', '.join(data.classes)}",
            )
            mapping[member] = name
    with warnings.catch_warnings():
        # It warns that such labels leak at test time: what this recipe is about.
        warnings.simplefilter("ignore", normswap.ContextWarning)
        assigner = normswap.contexts.from_superclasses(mapping or "cifar100", data.classes)
    return replace(data, domains=assigner(data.labels), domain_names=list(assigner.names))


def with_clusters(
    loader: Loader, features: Literal["pixels"] | nn.Module, clusters: int, seed: int
) -> tuple[DomainData, str]:
    """Make a domain of each cluster of the training images; every image is assigned by itself."""
    data = loader.data
    every, trains = (
        [loader.normalised(part) for part in pixels.split(TEST_BATCH)]
        for pixels in (data.images, data.images[data.train])
    )
    if isinstance(features, nn.Module):
        features = copy.deepcopy(features).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", normswap.ContextWarning)  # of small clusters: reported
        assigner = normswap.contexts.kmeans(trains, clusters, features, seed=seed, progress=False)
    found = torch.cat([assigner(part).cpu() for part in every])
    names, shown = [f"cluster {k}" for k in range(clusters)], []
    for cluster, name in enumerate(names):
        inside = data.domains[data.train & (found == cluster)].tolist()
        kinds = [f"{inside.count(i)} {kind}" for i, kind in enumerate(data.domain_names)]
        shown.append(f"{name}: " + ", ".join(kinds))
    return replace(data, domains=found, domain_names=names), "; ".join(shown)


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS)
    images.add_options(parser, DIGITS_EPOCHS)
    add = parser.add_argument
    add("--superclasses", nargs="+", metavar="NAME=CLASS,CLASS", help="or cifar100; see above")
