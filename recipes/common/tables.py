"""The tables that a fine-tuning ends with."""

from statistics import mean, median
from typing import Any

from tabulate import tabulate

from .data import DomainData
from .training import Arm

Epoch = dict[str, Any]


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
    losses = ", ".join(f"{arm.name} {record['arms'][arm.name]['loss']:.3f}" for arm in arms)
    return f"epoch {record['epoch']}: loss {losses}; accuracy {'; '.join(found)}"
