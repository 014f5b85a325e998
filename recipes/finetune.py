"""`python -m recipes finetune`: a timm backbone with context-aware norms, beside BatchNorm.

The steps, in order: settings, images, one timm model, its converted copy, training side by side,
tables and curves. With no options it runs offline in minutes, on rotated handwritten digits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn

import normswap

from . import parallel, runs, tables
from .config import Config, add_arguments, resolve, resolve_resumed, to_dict
from .curves import draw_curves
from .data import DomainData, Loader
from .digits import load_digits
from .errors import RecipeError
from .folders import load_folder
from .losses import AugMix, crossnorm_layers
from .parallel import say
from .training import Arm, evaluate, fill_statistics, make_arm, train_epoch
from .weights import make_backbone

SMOKE_DIGITS = 240
SMOKE_IMAGES_PER_CLASS = 6


def main(argv: list[str]) -> int:
    """Run the recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    try:
        given = vars(_parser().parse_args(argv))
        with parallel.joined(given.get("device", "auto")):
            try:
                run(**{key: given.pop(key) for key in ("out", "name", "resume")}, given=given)
            except (RecipeError, normswap.NormswapError) as error:
                where = "" if parallel.is_first() else f" (process {parallel.rank()})"
                print(f"error{where}: {error}", file=sys.stderr)
                return 2
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; every finished epoch is saved", file=sys.stderr)
        return 130
    return 0


def run(out: Path, name: str | None, resume: bool, given: dict[str, Any]) -> None:
    """Do what the recipe does; nothing is written before everything has been checked."""
    if resume and name is None:
        raise RecipeError("expected --name with --resume, to know which run to continue")
    if resume:
        config = resolve_resumed(given, runs.read_config(out / name))
    else:
        config = resolve(given)
        name = parallel.from_first(name or runs.free_name(out, _default_name(config)))
        if parallel.is_first():
            runs.check_new(out / name)
    folder = out / name
    device = pick_device(config.device)
    start = time.perf_counter()

    check_model_name(config.model)
    data = load_data(config)
    arms, loader = build(config, data, device)
    history = runs.load_checkpoint(folder, arms) if resume else []
    say(normswap.summary(arms[-1].model))
    say(describe(config, data, loader, device))
    say(tables.losses(arms))

    if not resume and parallel.is_first():
        runs.create(folder, to_dict(config), runs.versions())
    say(
        f"writing {folder}; to continue after a stop: "
        f"{parallel.launcher()} -m recipes finetune --out {out} --name {name} --resume"
    )
    for epoch in range(len(history), config.epochs):
        record = train_and_test(arms, loader, config, epoch)
        history.append(record)
        if parallel.is_first():
            runs.save_checkpoint(folder, arms, history)
        say(tables.epoch_line(record, arms, data), flush=True)

    if parallel.is_first():
        finish(folder, config, history, arms, data)
        say(
            f"{folder} is complete, {time.perf_counter() - start:.0f} s in all; report.txt there "
            "also says how far the contexts' statistics moved apart"
        )


def finish(
    folder: Path,
    config: Config,
    history: list[dict[str, Any]],
    arms: list[Arm],
    data: DomainData,
) -> None:
    """Write what a finished run leaves, and print its tables."""
    runs.write_metrics(folder, history)
    runs.save_model(folder, arms[-1])
    draw_curves(folder / "curves.png", history, arms, data, f"{config.model}, {folder.name}")
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


def load_data(config: Config) -> DomainData:
    """Load the digits or the folder, a few images of it for a smoke test."""
    if config.data is None:
        limit = SMOKE_DIGITS if config.smoke else None
        return load_digits(config.image_size or 32, config.seed, config.held_out, limit)
    size = config.image_size
    if size is None:
        size = timm.get_pretrained_cfg_value(config.model, "input_size")[-1]
    limit = SMOKE_IMAGES_PER_CLASS if config.smoke else None
    return load_folder(Path(config.data), size, config.seed, config.held_out, limit, config.workers)


def build(config: Config, data: DomainData, device: torch.device) -> tuple[list[Arm], Loader]:
    """Make the backbone, load its weights, convert a copy; give the models ready to train.

    The converted model is always the last; the unconverted one is the very model it was made from.
    """
    torch.manual_seed(config.seed)
    model, notes = make_backbone(config.model, len(data.classes), config.pretrained, config.weights)
    for line in notes:
        say(line)
    images = timm.data.resolve_model_data_config(model)
    mix = AugMix(images["mean"]) if config.loss.startswith("augmix") else None
    loader = Loader(data, images["mean"], images["std"], config.batch_size, device, mix)
    model.to(device)
    check_image_size(model, loader, config)
    if not (config.pretrained or config.weights):
        fill_statistics(model, loader, config)
    converted = normswap.convert(
        model,
        method=config.method,
        contexts=data.contexts if normswap.get_method(config.method).needs_context else None,
        unknown=config.unknown,
        example_inputs=(loader.batch(loader.train_indices[:2]).images,),
    )
    if config.loss.endswith("jsd") and not crossnorm_layers(converted):
        raise RecipeError(
            f"expected a --method with CrossNorm, such as crossnorm or cnsn, for --loss "
            f"{config.loss}, got {config.method}"
        )
    steps = loader.batches_per_epoch
    arms = [make_arm("bn", model, config, steps)] if config.baseline else []
    return [*arms, make_arm(config.method, converted, config, steps)], loader


def train_and_test(arms: list[Arm], loader: Loader, config: Config, epoch: int) -> dict[str, Any]:
    """Train an epoch, evaluate, and give the epoch's record."""
    start = time.perf_counter()
    report = train_epoch(arms, loader, config, epoch)
    for arm in arms:
        report[arm.name]["accuracy"] = evaluate(arm, loader, config)
    return {"epoch": epoch + 1, "seconds": time.perf_counter() - start, "arms": report}


def check_model_name(name: str) -> None:
    """Refuse a name timm does not know, with the names most like it."""
    if timm.is_model(name):
        return
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise RecipeError(f"expected --model to be a name timm knows, got {name!r}{hint}")


def check_image_size(model: nn.Module, loader: Loader, config: Config) -> None:
    """Try two images, since many backbones take only some sizes."""
    images = loader.batch(loader.train_indices[:2]).images
    try:
        with torch.inference_mode():
            model.eval()(images)
    except (RuntimeError, AssertionError) as error:
        side = images.shape[-1]
        raise RecipeError(
            f"{config.model} cannot take images of {side} px ({str(error).splitlines()[0]}); "
            "set another --image-size"
        ) from error


def pick_device(name: str) -> torch.device:
    """Give the device of this name; `auto` is the first accelerator, else the CPU."""
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        name = "cpu" if found is None else found.type
    try:
        device = torch.device(parallel.local_device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"expected --device to be usable, got {name!r}: {reason}") from error
    return device


def describe(config: Config, data: DomainData, loader: Loader, device: torch.device) -> str:
    """Say what is about to be trained on what."""
    held_out = f", {data.held_out} held out" if data.held_out else ""
    return (
        f"{config.model} on {device}: {int(data.train.sum()):,} training and "
        f"{int(data.test.sum()):,} test images of {data.images.shape[-1]} px, "
        f"{len(data.classes)} classes, domains {', '.join(data.domain_names)}{held_out} "
        f"({data.note}); {config.epochs} epochs of {loader.batches_per_epoch} steps of "
        f"{config.batch_size}"
        + (f", shared by {parallel.size()} processes" if parallel.size() > 1 else "")
    )


def _default_name(config: Config) -> str:
    source = "digits" if config.data is None else Path(config.data).resolve().name
    loss = "" if config.loss == "ce" else f"-{config.loss}"
    smoke = "-smoke" if config.smoke else ""
    return f"{source}-{config.model}-{config.method}{loss}{smoke}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes finetune", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs go (runs)")
    parser.add_argument("--name", help="the run's folder (default: of data, model, method, loss)")
    parser.add_argument("--resume", action="store_true", help="continue a run after its last epoch")
    return parser
