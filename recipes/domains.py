"""`python -m recipes domains`: train on several domains, test on one never seen, or on all.

One domain after the other is held out (domain generalisation), or with --joint none is: all train
together and each is tested on images of its own. A method with contexts has the training domains
as contexts. Images of a domain never seen have no label; they are normalised with

    pooled      the one Gaussian of the mixture of contexts
    posterior   contexts weighed by how well they explain the image
    nearest     the training domain whose early features are most alike

Methods have the default settings of `convert` (ACN: one responsibility an image and channel).
Results are those of the last epoch. --tune chooses by images of the training domains, for each
domain held out anew. `bn-frozen` is BatchNorm that keeps the statistics it was
pretrained with, and `cn-frozen` CN that does: CN-X does without batch statistics too, and what
comes of that is not to be put down to contexts.
"""

import copy
from argparse import Namespace
from statistics import mean
from typing import Any

import torch
from sklearn.feature_selection import VarianceThreshold
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import normswap

from .common import grid, images, methods, reports, runs, scores
from .common.data import DomainData, Loader, validation
from .common.errors import check
from .common.options import ByData, ByStart, Parser, of_cell, resolve
from .common.training import Log, takes_context, train

METHODS = (
    *("bn", "bn-frozen", "mixstyle", "crossnorm", "selfnorm", "cnsn"),
    *("cn", "cn-frozen", "cn-x", "acn"),
)
STYLES = 2048  # training images that tell what domains look like
JOINT = "none"  # held out of a training of all domains
KNOWN = "label known"
Accuracy = dict[str, dict[str, float]]  # by kind of label, by domain, in per cent


def run(options: Namespace) -> None:
    both = f"expected --joint or --held-out, got both ({' '.join(options.held_out or ())})"
    alone = not (options.joint and options.held_out)
    check(alone, f"{both}; a joint training holds no domain out")
    resolve(options, seeds=1, epochs=1, limit=6)

    joint = of_cell(options, held_out=None)
    data = images.load(joint)
    for method in options.methods:  # what is wrong is said before anything is written
        start, *_ = images.build(joint, data, 0, fill=False)
        apply_method(method, start, data.contexts)
    names = data.domain_names
    held = [JOINT] if options.joint else (options.held_out or names)
    for domain in held:
        if domain not in (JOINT, *names):
            images.load(of_cell(options, held_out=domain))  # says which there are
    recipe = "domains-joint" if options.joint else "domains"
    wanted = [{"held_out": domain, **cell} for domain in held for cell in grid.cells(options)]
    wanted.sort(key=lambda cell: cell["seed"])

    free = (*runs.FREE, "held_out")
    folder, records = grid.run(
        options, recipe, start_of, train_one, trained_mean, wanted=wanted, free=free
    )
    rows = tabulated(records, grid.read_lines(folder / grid.EPOCHS), options.reach)
    headings = {domain: domain for domain in (names if options.joint else held)}
    compared = "mean" if len(headings) > 1 else None
    more = {"trained": "domains trained on"}
    if options.joint:
        more = {"first": "mean after 1 epoch", "reached": f"epochs to {options.reach:g} %"}
    headings |= {"mean": "mean"} if compared else {}
    reports.show(folder, rows, headings, "accuracy by domain", more, compared)


def apply_method(method: str, model: nn.Module, contexts: list[str]) -> nn.Module:
    settings: dict[str, Any] = {"assignment": "instance"} if method == "acn" else {}
    return methods.convert(model, method, contexts, verify=False, **settings)


class NearestDomain:
    """Assigns images to the training domain whose mean style is nearest.

    Style is what early features are like: the mean and the logarithm of the spread of every channel
    that enters the model's first batch norm, standardised over the training images. It is fitted
    on training images and sees nothing but the image when it is asked.
    """

    def __init__(self, model: nn.Module, loader: Loader) -> None:
        self._model = copy.deepcopy(model).eval()
        norms = nn.modules.batchnorm._NormBase
        first = next(m for m in self._model.modules() if isinstance(m, norms))
        first.register_forward_pre_hook(lambda _, args: setattr(self, "_seen", args[0]))
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(loader.train_indices), generator=generator)[:STYLES]
        batches = [loader.batch(i) for i in loader.train_indices[order].split(256)]
        styles = torch.cat([self._style(batch.images) for batch in batches])
        domains = torch.cat([batch.context for batch in batches]).cpu()
        self._nearest = make_pipeline(VarianceThreshold(1e-9), StandardScaler(), NearestCentroid())
        self._nearest.fit(styles.numpy(), domains.numpy())

    def __call__(self, images: Tensor) -> Tensor:
        found = self._nearest.predict(self._style(images).numpy())
        return torch.as_tensor(found).to(images.device)

    @torch.no_grad()
    def _style(self, images: Tensor) -> Tensor:
        self._model(images)
        variance, mean = torch.var_mean(self._seen.float(), (2, 3))
        return torch.cat([mean, (variance + 1e-6).log() / 2], 1).cpu()


def start_of(config: Namespace) -> tuple[DomainData, NearestDomain]:
    config.held_out = None if config.held_out == JOINT else config.held_out
    data = images.load(config, config.seed)
    start, loader, _ = images.build(config, data, config.seed, fill=False)
    return data, NearestDomain(start, loader)


def train_one(
    given: tuple[DomainData, NearestDomain], config: Namespace, log: Log
) -> dict[str, Any]:
    data, nearest = given
    data = data if config.final else validation(data)
    model, loader, _ = images.build(config, data, config.seed)
    model = apply_method(config.method, model, data.contexts)
    model.to(config.device, memory_format=torch.channels_last)
    figures: dict[str, Any] = {}

    def tested(line: dict[str, Any]) -> None:
        figures["accuracy"] = measure(model, loader, nearest if config.final else None)
        log({**line, **figures})

    report = train(config.method, model, loader, config, tested)
    return {**figures, "step_ms": report["step_ms"]}


def measure(model: nn.Module, loader: Loader, nearest: NearestDomain | None) -> Accuracy:
    """Measure the accuracy by domain; with contexts also by kind of label, unknown if held out.

    Without `nearest`, on the trained domains alone, labels known where the model takes them.
    """
    data = loader.data
    if not takes_context(model):
        names = data.domain_names if nearest else data.contexts
        return {"": scores.by_domain(model, loader, names)}
    found = {KNOWN: scores.by_domain(model, loader, data.contexts, scores.own)}
    if nearest is None:
        return found
    asked = data.domain_names if data.held_out is None else [data.held_out]
    for policy in scores.POLICIES:
        normswap.set_unknown(model, policy)
        found[policy] = scores.by_domain(model, loader, asked)
    found["nearest"] = scores.by_domain(model, loader, asked, lambda b: nearest(b.images))
    return found


def trained_mean(record: dict[str, Any]) -> float:
    """Give the mean accuracy on the trained domains of a training that tried a rate."""
    (found,) = record["accuracy"].values()
    return mean(found.values())


def tabulated(
    records: list[dict[str, Any]], epochs: list[dict[str, Any]], reach: float
) -> list[dict[str, Any]]:
    """Give one record a method, kind of label and seed, with the domains as its figures.

    A held-out domain's figure is of the training it was held out of; `trained` is the mean over
    those trainings of the trained domains' own test images. For joint trainings also: `first`, the
    mean after the first epoch, and `reached`, the first epoch with a mean of `reach` or more.
    `rate` is the mean of the rates.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        held, method, seed = (record["cell"][key] for key in ("held_out", "method", "seed"))
        for kind, accuracy in record["accuracy"].items():
            if held != JOINT and held not in accuracy:
                continue
            name = f"{method}, {kind}" if kind else method
            new = {"cell": {"method": name, "seed": seed}, "held": {}, "own": [], "rates": []}
            row = rows.setdefault((name, seed), new)
            row["rates"].append(record["rate"])
            if held == JOINT:
                mine = [e["accuracy"][kind] for e in epochs if e["cell"] == record["cell"]]
                curve = [mean(found.values()) for found in mine]
                row.update(held=accuracy, first=curve[0])
                row["reached"] = next((i for i, a in enumerate(curve, 1) if a >= reach), None)
            else:
                row["held"][held] = accuracy[held]
                own = record["accuracy"].get(KNOWN, accuracy)
                row["own"].append(mean(a for d, a in own.items() if d != held))
    for row in rows.values():
        trained = mean(row["own"]) if row["own"] else None
        row.update({**row["held"], "mean": mean(row["held"].values()), "trained": trained})
        row["rate"] = mean(row["rates"])
    return list(rows.values())


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS, methods.known())
    parser.share("data", "model", "weights", "pretrained", "tune")
    parser.share(lr=ByStart(2e-3, 5e-4), drop_labels=0.0)
    parser.share(image_size=ByData(32, 64), epochs=ByData(12, 3))
    add = parser.add_argument
    add("--joint", action="store_true", help="train on all domains, and hold none out")
    add("--held-out", nargs="+", metavar="DOMAIN", help="these alone, instead of each in turn")
    add("--reach", type=float, default=90.0, help="with --joint: epochs to this accuracy")
