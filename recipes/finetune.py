"""`python -m recipes finetune`: a timm backbone with context-aware norms, beside BatchNorm.

The steps, in order: settings, images, one timm model, its converted copy, training side by side,
tables and curves. With no options it runs offline in minutes, on rotated handwritten digits.
"""

import argparse
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import normswap
from normswap import plot
from normswap.plot.run_files import read_curves

from . import grid, images, methods, parallel, runs, tables
from .data import DomainData, Loader
from .errors import RecipeError
from .losses import LOSSES, crossnorm_layers
from .options import TUNED, ByData, Parser, count, resolve
from .parallel import say
from .scores import evaluate
from .training import Arm, make_arm, train_epoch


def run(options: Namespace) -> None:
    """Do what the recipe does, alone or as one of several processes."""
    with parallel.joined(options.device):
        settle(options)
        train(options)


def settle(options: Namespace) -> None:
    """Decide what was left open and check it."""
    resolve(options, epochs=options.epochs if isinstance(options.epochs, int) else 2, limit=6)


def train(options: Namespace) -> None:
    """Train both models; nothing is written before everything has been checked."""
    start = time.perf_counter()
    folder = parallel.from_first(runs.folder_of(options, "finetune", _stem(options)))
    device = images.pick_device(options.device)
    data = images.load(options, options.seed)
    arms, loader = build(options, data, device)
    history = runs.load_checkpoint(folder, arms) if options.resume else []
    say(normswap.summary(arms[-1].model))
    say(describe(options, data, loader, device))
    say(tables.losses(arms))

    if not options.resume and parallel.is_first():
        runs.write_config(folder, runs.settings_of(options, "finetune"))
    say(
        f"writing {folder}; to continue after a stop: "
        f"{parallel.launcher()} -m recipes finetune --out {options.out} --name {folder.name} "
        "--resume"
    )
    for epoch in range(len(history), options.epochs):
        record = train_and_test(arms, loader, options, epoch)
        history.append(record)
        if parallel.is_first():
            runs.save_checkpoint(folder, arms, history)
        say(tables.epoch_line(record, arms, data), flush=True)

    if parallel.is_first():
        finish(folder, options, history, arms, data)
        say(
            f"{folder} is complete, {time.perf_counter() - start:.0f} s in all; report.txt there "
            "also says how far the contexts' statistics moved apart"
        )


def finish(
    folder: Path,
    options: Namespace,
    history: list[dict[str, Any]],
    arms: list[Arm],
    data: DomainData,
) -> None:
    """Write what a finished run leaves, and print its tables."""
    runs.write_lines(folder / runs.METRICS, history)
    runs.save_model(folder, arms[-1].model)
    given = {**read_curves(folder), "title": f"{options.model}, {folder.name}"}
    plot.curves(**given, path=folder / "curves.png")
    report = "\n".join(
        [
            tables.accuracy_table(history, arms, data),
            tables.uncertainty(history, arms, data),
            tables.losses(arms),
            tables.cost_table(history, arms),
        ]
    )
    trained = normswap.summary(arms[-1].model)
    runs.write_text(folder / "report.txt", f"{report}\n\n{trained}\n")
    say(report)


def build(options: Namespace, data: DomainData, device: torch.device) -> tuple[list[Arm], Loader]:
    """Make the backbone, convert a copy; give the models ready to train.

    The converted model is always the last; the unconverted one is the very model it was made from.
    """
    model, loader, notes = images.build(options, data, options.seed, device)
    for line in notes:
        say(line)
    converted = methods.convert(
        model,
        options.method,
        data.contexts,
        unknown=options.unknown,
        example_inputs=(images.example(loader),),
    )
    if options.loss.endswith("jsd") and not crossnorm_layers(converted):
        raise RecipeError(
            f"expected a --method with CrossNorm, such as crossnorm or cnsn, for --loss "
            f"{options.loss}, got {options.method}"
        )
    steps = loader.batches_per_epoch
    arms = [make_arm("bn", model, options, steps)] if options.baseline else []
    return [*arms, make_arm(options.method, converted, options, steps)], loader


def train_and_test(
    arms: list[Arm], loader: Loader, config: Namespace, epoch: int
) -> dict[str, Any]:
    """Train an epoch, evaluate, and give the epoch's record."""
    start = time.perf_counter()
    report = train_epoch(arms, loader, config, epoch)
    for arm in arms:
        report[arm.name]["accuracy"] = evaluate(arm, loader, config)
    return {"epoch": epoch + 1, "seconds": time.perf_counter() - start, "arms": report}


def describe(options: Namespace, data: DomainData, loader: Loader, device: torch.device) -> str:
    """Say what is about to be trained on what."""
    held_out = f", {data.held_out} held out" if data.held_out else ""
    return (
        f"{options.model} on {device}: {int(data.train.sum()):,} training and "
        f"{int(data.test.sum()):,} test images of {data.images.shape[-1]} px, "
        f"{len(data.classes)} classes, domains {', '.join(data.domain_names)}{held_out} "
        f"({data.note}); {options.epochs} epochs of {loader.batches_per_epoch} steps of "
        f"{options.batch_size}"
        + (f", shared by {parallel.size()} processes" if parallel.size() > 1 else "")
    )


def _stem(options: Namespace) -> str:
    source = "digits" if options.data is None else options.data.resolve().name
    loss = "" if options.loss == "ce" else f"-{options.loss}"
    smoke = "-smoke" if options.smoke else ""
    return f"{source}-{options.model}-{options.method}{loss}{smoke}"


def add_options(parser: Parser) -> None:
    runs.add_options(parser)
    parser.share(
        "data", "model", "pretrained", "weights",
        image_size=ByData(32, None), epochs=ByData(12, 10), batch_size=64, lr=TUNED,
        weight_decay=0.05, drop_labels=0.0,
    )  # fmt: skip
    add = parser.add_argument
    add("--held-out", help="domain that does not train, tested with its label unknown")
    add("--method", default="cn-x", choices=normswap.methods(), help="what replaces BatchNorm")
    add(
        "--unknown", choices=("pooled", "posterior"),
        help="what an unknown label means to the norms; by default what the method prefers",
    )  # fmt: skip
    add(
        "--loss", default="ce", choices=LOSSES,
        help="cross-entropy, alone or with JSD consistency over CrossNorm passes, AugMix or both",
    )  # fmt: skip
    add(
        "--baseline", default=True, action=argparse.BooleanOptionalAction,
        help="train the unconverted model beside it",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="decides split, start, batches")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--workers", type=count, default=2, help="processes that decode images")


main = partial(grid.command, "finetune", __doc__, add_options, run)
