"""`python -m recipes domains`: train on several domains, test on one never seen, or on all.

One domain after the other is held out (domain generalisation), or with --joint none is: all train
together and each is tested on images of its own. A method with contexts has the training domains
as contexts. Images of a domain never seen have no label; they are normalised with

    pooled      the one Gaussian of the mixture of contexts
    posterior   contexts weighed by how well they explain the image
    nearest     the training domain whose early features are most alike (`nearest.py`)

Every method starts from the same weights by seed, and has the same batches, schedule and number of
epochs, at the default settings of its conversion (ACN: one responsibility an image and channel).
Results are those of the last epoch: nothing is chosen on test images. `bn-frozen` is BatchNorm that
keeps the statistics it was pretrained with, and `cn-frozen` CN that does: CN-X does without batch
statistics too, and what comes of that is not to be put down to contexts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

import normswap

from . import frozen, grid
from .config import Config
from .data import DomainData, Loader
from .domain_rows import JOINT, tabulated
from .errors import RecipeError
from .finetune import check_image_size, check_model_name, load_data, pick_device
from .nearest import NearestDomain
from .points import draw_points
from .training import fill_statistics, make_arm, takes_context, train_epoch
from .weights import EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_TIMM, make_backbone

METHODS = (
    *("bn", "bn-frozen", "mixstyle", "crossnorm", "selfnorm", "cnsn"),
    *("cn", "cn-frozen", "cn-x", "acn"),
)
POLICIES = ("pooled", "posterior")
Accuracy = dict[str, dict[str, float]]  # by kind of label, by domain, in per cent


def main(argv: list[str]) -> int:
    """Run the recipe; give its exit code."""
    return grid.command(_parser(), run, argv)


def run(options: argparse.Namespace) -> None:
    """Train every method with every domain held out and every seed, and tabulate."""
    device = pick_device(options.device)
    seeds = range(1 if options.smoke else options.seeds)
    names = check(options).domain_names
    held = [JOINT] if options.joint else (options.held_out or names)
    for domain in held:
        if domain not in (JOINT, *names):
            load_data(_config(options, domain, 0))  # says which there are
    folder = grid.open_run(options, "domains-joint" if options.joint else "domains")
    cells = [
        {"held_out": domain, "method": method, "seed": seed}
        for seed in seeds
        for domain in held
        for method in options.methods
    ]
    cache: dict[tuple[str, int], tuple[DomainData, NearestDomain]] = {}

    def train(cell: grid.Cell, log: grid.Log) -> dict[str, Any]:
        key = (cell["held_out"], cell["seed"])
        config = _config(options, *key)
        if key not in cache:
            cache.clear()
            data = load_data(config)
            start = make_model(config, data)
            cache[key] = data, NearestDomain(start, make_loader(config, data, start, device))
        return train_one(cell["method"], config, *cache[key], device, log)

    records = grid.run_cells(folder, cells, train)
    epochs = grid.read_lines(folder / grid.EPOCHS)
    rows = tabulated(records, epochs, options.reach)
    headings = {domain: domain for domain in (names if options.joint else held)}
    if len(headings) > 1:
        headings["mean"] = "mean"
    draw_points(folder / "results.png", rows, "method", headings, "accuracy by domain")
    if options.joint:
        headings |= {"first": "mean after 1 epoch", "reached": f"epochs to {options.reach:g} %"}
    else:
        headings["trained"] = "domains trained on"
    grid.finish(folder, grid.table(rows, ["method"], headings))


def check(options: argparse.Namespace) -> DomainData:
    """Refuse what cannot be trained before anything is written; give the data of the first seed.

    Raises:
        RecipeError: a rate that is not above 0, a domain held out of a joint training, no such
            data, model or weights, or images the model cannot take.
    """
    if options.lr is not None and not options.lr > 0:
        raise RecipeError(f"expected --lr above 0, got {options.lr}")
    if options.joint and options.held_out:
        raise RecipeError(
            f"expected --joint or --held-out, got both ({' '.join(options.held_out)}); a joint "
            "training holds no domain out"
        )
    config = _config(options, None, 0)
    check_model_name(config.model)
    data = load_data(config)
    model = make_model(config, data)
    check_image_size(model, make_loader(config, data, model, torch.device("cpu")), config)
    return data


def make_model(config: Config, data: DomainData) -> nn.Module:
    """Build the backbone with its weights, the same for every method."""
    torch.manual_seed(config.seed)
    return make_backbone(config.model, len(data.classes), config.pretrained, config.weights)[0]


def make_loader(config: Config, data: DomainData, model: nn.Module, device: torch.device) -> Loader:
    """Build the loader with the model's mean and standard deviation."""
    images = timm.data.resolve_model_data_config(model)
    return Loader(data, images["mean"], images["std"], config.batch_size, device)


def apply_method(method: str, model: nn.Module, contexts: list[str]) -> nn.Module:
    """Convert the model; every method computes the same function before it is trained."""
    name = frozen.name_of(method)
    if name != "bn":
        settings: dict[str, Any] = {"assignment": "instance"} if name == "acn" else {}
        if name == "mixstyle":
            settings = after_early_stages(model)
        if normswap.get_method(name).needs_context:
            settings["contexts"] = contexts
        model = normswap.convert(model, name, verify=False, **settings)
    return frozen.freeze_if_asked(method, model)


def after_early_stages(model: nn.Module) -> dict[str, Any]:
    """Return where MixStyle's authors have it: after layer1 and layer2 of a ResNet.

    Raises:
        RecipeError: the model does not say which its stages are.
    """
    stages = [i["module"] for i in getattr(model, "feature_info", ()) if i["reduction"] in (4, 8)]
    if not stages:
        raise RecipeError(
            f"expected a timm model with stages of reduction 4 and 8 for mixstyle, got "
            f"{type(model).__name__}; leave mixstyle out of --methods"
        )
    return {"placement": "output", "select": stages}


def train_one(
    method: str,
    config: Config,
    data: DomainData,
    nearest: NearestDomain,
    device: torch.device,
    log: grid.Log,
) -> dict[str, Any]:
    """Train one model and give the accuracies of its last epoch."""
    model = make_model(config, data)
    loader = make_loader(config, data, model, device)
    if not (config.pretrained or config.weights):
        fill_statistics(model, loader, config)
    model = apply_method(method, model, data.contexts)
    model.to(device, memory_format=torch.channels_last)
    arm = make_arm(method, model, config, loader.batches_per_epoch)
    accuracy: Accuracy = {}
    report: dict[str, Any] = {}
    for epoch in range(config.epochs):
        report = train_epoch([arm], loader, config, epoch)[method]
        accuracy = measure(model, loader, nearest)
        log({"epoch": epoch + 1, "loss": report["loss"], "accuracy": accuracy})
    return {"accuracy": accuracy, "step_ms": report["step_ms"]}


@torch.inference_mode()
def measure(model: nn.Module, loader: Loader, nearest: NearestDomain) -> Accuracy:
    """Measure the accuracy on the test images of each domain.

    With contexts also by kind of label; a held-out domain has none, and those it was trained with
    are then tested with theirs.
    """
    model.eval()
    if not takes_context(model):
        return {"": _accuracy(model, loader, lambda batch: {}, loader.data.domain_names)}
    data = loader.data
    known = _accuracy(model, loader, lambda batch: {"context": batch.context}, data.contexts)
    found = {"label known": known}
    domains = data.domain_names if data.held_out is None else [data.held_out]
    for policy in POLICIES:
        normswap.set_unknown(model, policy)
        found[policy] = _accuracy(model, loader, lambda batch: {"context": None}, domains)
    found["nearest"] = _accuracy(
        model, loader, lambda batch: {"context": nearest(batch.images)}, domains
    )
    return found


def _accuracy(
    model: nn.Module, loader: Loader, labels: Any, domains: list[str]
) -> dict[str, float]:
    found = {}
    for domain in domains:
        right: list[Tensor] = []
        for batch in loader.domain_test(loader.data.domain_names.index(domain)):
            right.append(model(batch.images, **labels(batch)).argmax(1) == batch.labels)
        found[domain] = 100 * torch.cat(right).float().mean().item()
    return found


def _config(options: argparse.Namespace, held_out: str | None, seed: int) -> Config:
    """Give the settings of one training, as the fine-tuning recipe's parts take them."""
    digits = options.data is None
    model = options.model
    if model is None:
        lite = options.weights == EFFICIENTNET_LITE0
        model = EFFICIENTNET_LITE0_TIMM if lite else "resnet10t"
    epochs = options.epochs or (12 if digits else 3)
    return Config(
        data=None if digits else str(options.data),
        held_out=None if held_out == JOINT else held_out,
        image_size=options.image_size or (32 if digits else 64),
        model=model,
        pretrained=options.pretrained,
        weights=options.weights,
        epochs=1 if options.smoke else epochs,
        lr=options.lr or (5e-4 if options.pretrained or options.weights else 2e-3),
        seed=seed,
        smoke=options.smoke,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes domains", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", type=Path, help="folder DOMAIN/CLASS/image (default: rotated digits)")
    add("--joint", action="store_true", help="train on all domains, and hold none out")
    add("--held-out", nargs="+", metavar="DOMAIN", help="(default: each domain in turn)")
    add("--image-size", type=int, help="pixels a side (default: 32 for digits, else 64)")
    add("--model", help="any timm model with BatchNorm (default: resnet10t, or the weights')")
    add("--weights", help=f"a safetensors or torch file, or {EFFICIENTNET_LITE0}")
    add("--pretrained", action="store_true", help="timm's weights (downloads them)")
    add("--epochs", type=grid.count, help="(default: 12 for digits, else 3)")
    add("--lr", type=float, help="AdamW's peak (default: 2e-3; from given weights 5e-4)")
    add("--reach", type=float, default=90.0, help="with --joint: epochs to this accuracy (90)")
    grid.add_arguments(parser, METHODS, METHODS, seeds=3)
    return parser
