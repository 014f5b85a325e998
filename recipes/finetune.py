"""`python -m recipes finetune`: a timm backbone with context-aware norms, beside BatchNorm.

The steps, in order: settings, images, one timm model, its converted copy, training side by side,
tables and curves. With no options it runs offline in minutes, on rotated handwritten digits.
"""

import argparse
import time
from argparse import Namespace
from pathlib import Path
from statistics import mean, median
from typing import Any

from tabulate import tabulate

import normswap
from normswap import plot
from normswap.plot.run_files import read_curves

from .common import images, methods, parallel, runs
from .common.data import DomainData, Loader
from .common.errors import check
from .common.losses import LOSSES, crossnorm_layers
from .common.options import TUNED, ByData, Parser, resolve
from .common.parallel import say
from .common.scores import evaluate
from .common.training import Arm, make_arm, train_epoch

Epoch = dict[str, Any]


def run(options: Namespace) -> None:
    settle(options)
    with parallel.joined(options.device):
        train(options)


def settle(options: Namespace) -> None:
    resolve(options, epochs=options.epochs if isinstance(options.epochs, int) else 2, limit=6)


def train(options: Namespace) -> None:
    """Train both models; nothing is written before everything has been checked."""
    start = time.perf_counter()
    folder = parallel.from_first(runs.folder_of(options, "finetune", _stem(options)))
    data = images.load(options, options.seed)
    arms, loader = build(options, data)
    history = runs.load_checkpoint(folder, arms) if options.resume else []
    say(normswap.summary(arms[-1].model))
    say(describe(options, data, loader))
    say(losses(arms))
    if not options.resume and parallel.is_first():
        runs.write_config(folder, runs.settings_of(options, "finetune"))
    size = parallel.size()
    launcher = "python" if size == 1 else f"torchrun --nproc-per-node={size}"
    again = f"{launcher} -m recipes finetune --out {options.out} --name {folder.name} --resume"
    say(f"writing {folder}; to continue after a stop: {again}")
    for epoch in range(len(history), options.epochs):
        history.append(train_and_test(arms, loader, options, epoch))
        if parallel.is_first():
            runs.save_checkpoint(folder, arms, history)
        say(epoch_line(history[-1], arms, data), flush=True)
    if parallel.is_first():
        finish(folder, options, history, arms, data)
        say(
            f"{folder} is complete, {time.perf_counter() - start:.0f} s in all; report.txt there "
            "also says how far the contexts' statistics moved apart"
        )


def finish(
    folder: Path, options: Namespace, history: list[Epoch], arms: list[Arm], data: DomainData
) -> None:
    runs.write_lines(folder / runs.METRICS, history)
    runs.save_model(folder, arms[-1].model)
    given = {**read_curves(folder), "title": f"{options.model}, {folder.name}"}
    plot.curves(**given, path=folder / "curves.png")
    accuracy, cost = accuracy_table(history, arms, data), cost_table(history, arms)
    report = "\n".join([accuracy, losses(arms), cost])
    runs.write_text(folder / "report.txt", f"{report}\n\n{normswap.summary(arms[-1].model)}\n")
    say(report)


def build(options: Namespace, data: DomainData) -> tuple[list[Arm], Loader]:
    """Make the backbone and a converted copy of it, which is the last, ready to train."""
    model, loader, notes = images.build(options, data, options.seed)
    for line in notes:
        say(line)
    how = {"unknown": options.unknown, "example_inputs": (images.example(loader),)}
    converted = methods.convert(model, options.method, data.contexts, **how)
    check(
        not options.loss.endswith("jsd") or crossnorm_layers(converted),
        f"expected a --method with CrossNorm, such as crossnorm or cnsn, for --loss "
        f"{options.loss}, got {options.method}",
    )
    chosen = {"bn": model} if options.baseline else {}
    chosen[options.method] = converted
    steps = options.epochs * loader.batches_per_epoch
    return [make_arm(name, m, options, steps) for name, m in chosen.items()], loader


def train_and_test(arms: list[Arm], loader: Loader, config: Namespace, epoch: int) -> Epoch:
    start = time.perf_counter()
    report = train_epoch(arms, loader, config, epoch)
    for arm in arms:
        report[arm.name]["accuracy"] = evaluate(arm, loader, config)
    return {"epoch": epoch + 1, "seconds": time.perf_counter() - start, "arms": report}


def columns(arms: list[Arm]) -> list[tuple[str, str, str]]:
    return [
        (arm.name, kind, f"{arm.name}, label {kind}" if arm.takes_context else arm.name)
        for arm in arms
        for kind in (("known", "unknown") if arm.takes_context else ("unknown",))
    ]


def mean_accuracy(record: Epoch, arm: str, kind: str, data: DomainData) -> float:
    return mean(record["arms"][arm]["accuracy"][kind][domain] for domain in data.contexts)


def accuracy_table(history: list[Epoch], arms: list[Arm], data: DomainData) -> str:
    """Tabulate the accuracy of the last epoch by domain, and say how far chance moves one."""
    last, chosen, rows = history[-1]["arms"], columns(arms), []
    counts = [int((data.test & (data.domains == i)).sum()) for i in range(len(data.domain_names))]
    for domain, count in zip(data.domain_names, counts, strict=True):
        name = f"{domain} (held out)" if domain == data.held_out else domain
        found = [last[arm]["accuracy"][kind].get(domain) for arm, kind, _ in chosen]
        rows.append([name, count, *found])
    means = [mean_accuracy(history[-1], arm, kind, data) for arm, kind, _ in chosen]
    headings = ["test accuracy, %", "images", *(heading for _, _, heading in chosen)]
    how = {"tablefmt": "simple_outline", "floatfmt": ".1f", "missingval": "-", "numalign": "right"}
    table = tabulate([*rows, ["mean of trained", "", *means]], headings, **how)
    worst = min(v for arm, kind, _ in chosen for v in last[arm]["accuracy"][kind].values())
    error = 100 * ((worst / 100) * (1 - worst / 100) / counts[0]) ** 0.5
    return (
        f"{table}\nOne seed. The standard error of an accuracy of {worst:.1f} % over {counts[0]} "
        f"images is {error:.1f} points; differences below two of them are not shown by this run."
    )


def cost_table(history: list[Epoch], arms: list[Arm]) -> str:
    """Tabulate parameters and step times, the latter as medians with the range over epochs."""
    rows = []
    for arm in arms:
        reports = [record["arms"][arm.name] for record in history]
        steps = [report["step_ms"] for report in reports]
        middle, low, high = map(median, zip(*(r["step_ratio"] for r in reports), strict=True))
        parameters = f"{sum(p.numel() for p in arm.model.parameters()):,}"
        times = f"{median(steps):.1f}", f"{min(steps):.1f} to {max(steps):.1f}"
        rows.append([arm.name, parameters, *times, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    headings = ["model", "parameters", "step, ms", "over epochs", f"step / {arms[0].name}"]
    headings.append("8 in 10 steps")
    return tabulate(rows, headings, tablefmt="simple_outline", disable_numparse=True)


def losses(arms: list[Arm]) -> str:
    """Say what each model trains with; one without CrossNorm lacks the loss that needs it."""
    names = ", ".join(f"{arm.name} {arm.loss}" for arm in arms)
    partly = len({arm.loss for arm in arms}) > 1
    return f"Training loss: {names}" + (" (the rest needs CrossNorm)." if partly else ".")


def epoch_line(record: Epoch, arms: list[Arm], data: DomainData) -> str:
    found = [f"{text} {mean_accuracy(record, *a, data):.1f} %" for *a, text in columns(arms)]
    lost = ", ".join(f"{arm.name} {record['arms'][arm.name]['loss']:.3f}" for arm in arms)
    return f"epoch {record['epoch']}: loss {lost}; accuracy {'; '.join(found)}"


def describe(options: Namespace, data: DomainData, loader: Loader) -> str:
    held_out = f", {data.held_out} held out" if data.held_out else ""
    processes = f", shared by {parallel.size()} processes" if parallel.size() > 1 else ""
    return (
        f"{options.model} on {options.device}: {int(data.train.sum()):,} training and "
        f"{int(data.test.sum()):,} test images of {data.images.shape[-1]} px, "
        f"{len(data.classes)} classes, domains {', '.join(data.domain_names)}{held_out} "
        f"({data.note}); {options.epochs} epochs of {loader.batches_per_epoch} steps of "
        f"{options.batch_size}{processes}"
    )


def _stem(options: Namespace) -> str:
    source = "digits" if options.data is None else options.data.resolve().name
    loss = "" if options.loss == "ce" else f"-{options.loss}"
    return f"{source}-{options.model}-{options.method}{loss}{'-smoke' if options.smoke else ''}"


def add_options(parser: Parser) -> None:
    runs.add_options(parser)
    parser.share("data", "model", "pretrained", "weights", "amp", lr=TUNED, batch_size=64)
    parser.share(weight_decay=0.05, drop_labels=0.0, workers=2)
    parser.share(image_size=ByData(32, None), epochs=ByData(12, 10))
    add, policies = parser.add_argument, ("pooled", "posterior")
    add("--held-out", help="domain that does not train, tested with its label unknown")
    add("--method", default="cn-x", choices=normswap.methods(), help="what replaces BatchNorm")
    unknown = "what an unknown label means to the norms; by default what the method prefers"
    add("--unknown", choices=policies, help=unknown)
    loss = "cross-entropy, alone or with JSD consistency over CrossNorm passes, AugMix or both"
    add("--loss", default="ce", choices=LOSSES, help=loss)
    either = argparse.BooleanOptionalAction
    add("--baseline", default=True, action=either, help="train the unconverted model beside it")
    add("--seed", type=int, default=0, help="decides split, start, batches")
