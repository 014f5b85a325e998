"""The tables that a fine-tuning ends with."""

import statistics
from typing import Any

from tabulate import tabulate

from .data import DomainData
from .training import Arm


def columns(arms: list[Arm]) -> list[tuple[str, str, str]]:
    """List what is compared: arm, label known or not, heading."""
    return [
        (arm.name, kind, f"{arm.name}, label {kind}" if arm.takes_context else arm.name)
        for arm in arms
        for kind in (("known", "unknown") if arm.takes_context else ("unknown",))
    ]


def mean_accuracy(record: dict[str, Any], arm: str, kind: str, data: DomainData) -> float:
    """Average an epoch's accuracy over the domains that train."""
    accuracy = record["arms"][arm]["accuracy"][kind]
    return statistics.mean(accuracy[domain] for domain in data.contexts)


def accuracy_table(history: list[dict[str, Any]], arms: list[Arm], data: DomainData) -> str:
    """Tabulate the accuracy of the last epoch by domain, with the mean over the trained domains."""
    last = history[-1]["arms"]
    chosen = columns(arms)
    rows = []
    for index, domain in enumerate(data.domain_names):
        count = int((data.test & (data.domains == index)).sum())
        name = f"{domain} (held out)" if domain == data.held_out else domain
        cells = [last[arm]["accuracy"][kind].get(domain) for arm, kind, _ in chosen]
        rows.append([name, count, *cells])
    means = [mean_accuracy(history[-1], arm, kind, data) for arm, kind, _ in chosen]
    rows.append(["mean of trained", "", *means])
    headings = ["test accuracy, %", "images", *(heading for _, _, heading in chosen)]
    return tabulate(
        rows, headings, tablefmt="simple_outline", floatfmt=".1f", missingval="-", numalign="right"
    )


def cost_table(history: list[dict[str, Any]], arms: list[Arm]) -> str:
    """Tabulate parameters and step times, the latter as medians with the range over epochs."""
    rows = []
    for arm in arms:
        reports = [record["arms"][arm.name] for record in history]
        steps = [report["step_ms"] for report in reports]
        ratios = zip(*(report["step_ratio"] for report in reports), strict=True)
        middle, low, high = map(statistics.median, ratios)
        parameters = f"{sum(p.numel() for p in arm.model.parameters()):,}"
        times = f"{statistics.median(steps):.1f}", f"{min(steps):.1f} to {max(steps):.1f}"
        rows.append([arm.name, parameters, *times, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    headings = ["model", "parameters", "step, ms", "over epochs", f"step / {arms[0].name}"]
    headings.append("8 in 10 steps")
    return tabulate(rows, headings, tablefmt="simple_outline", disable_numparse=True)


def uncertainty(history: list[dict[str, Any]], arms: list[Arm], data: DomainData) -> str:
    """Say how far chance alone moves one accuracy of the table."""
    last = history[-1]["arms"]
    count = int((data.test & (data.domains == 0)).sum())
    worst = min(
        value for arm, kind, _ in columns(arms) for value in last[arm]["accuracy"][kind].values()
    )
    error = 100 * ((worst / 100) * (1 - worst / 100) / count) ** 0.5
    return (
        f"One seed. The standard error of an accuracy of {worst:.1f} % over {count} images is "
        f"{error:.1f} points; differences below two of them are not shown by this run."
    )


def losses(arms: list[Arm]) -> str:
    """Say what each model trains with; one without CrossNorm lacks the loss that needs it."""
    names = ", ".join(f"{arm.name} {arm.loss}" for arm in arms)
    partly = len({arm.loss for arm in arms}) > 1
    return f"Training loss: {names}" + (" (the rest needs CrossNorm)." if partly else ".")


def epoch_line(record: dict[str, Any], arms: list[Arm], data: DomainData) -> str:
    """Say how an epoch went, in one line."""
    parts = []
    for arm, kind, heading in columns(arms):
        parts.append(f"{heading} {mean_accuracy(record, arm, kind, data):.1f} %")
    losses = ", ".join(f"{arm.name} {record['arms'][arm.name]['loss']:.3f}" for arm in arms)
    return f"epoch {record['epoch']}: loss {losses}; accuracy {'; '.join(parts)}"
