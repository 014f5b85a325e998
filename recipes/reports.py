"""How a grid of trainings ends: a picture, a table, and what both are made of.

runs/NAME/report.txt    the tables, with the command
runs/NAME/results.png
runs/NAME/table.json    the figures of each method and seed, for `python -m recipes results`
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import runs

MARKERS = "Ds^v"
TABLE = "table.json"
BASELINE = "bn"
Record = dict[str, Any]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Give mean and standard deviation over seeds as text."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def differences(records: Sequence[Record], figure: str) -> dict[str, list[float]]:
    """Give by method how much its figure is above BatchNorm's, in the trainings they share."""

    def rest(record: Record) -> str:
        return repr({k: v for k, v in record["cell"].items() if k != "method"})

    plain = {rest(r): r[figure] for r in records if r["cell"]["method"] == BASELINE}
    found: dict[str, list[float]] = {}
    for record in records:
        if record["cell"]["method"] != BASELINE and rest(record) in plain:
            value = record[figure] - plain[rest(record)]
            found.setdefault(record["cell"]["method"], []).append(value)
    return found


def table(
    records: Sequence[Record],
    figures: dict[str, str],
    compared: str | Sequence[str] | None = None,
    digits: int = 1,
) -> str:
    """Tabulate figures of each method as mean and standard deviation over its seeds.

    A figure in `compared` has a column more: the mean of its differences from BatchNorm's of the
    same seed, and their standard error, the deviation over the root of their number.
    """
    names = [compared] if isinstance(compared, str) else compared or ()
    gains = {name: differences(records, name) for name in names}
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["cell"]["method"], []).append(record)
    lines = []
    for method, group in rows.items():
        found = [[r[name] for r in group if r.get(name) is not None] for name in figures]
        texts = [spread(v, digits) if v else "-" for v in found]
        some = [f" ({len(v)} of {len(group)})" if 0 < len(v) < len(group) else "" for v in found]
        line = [method, len(group), *(map("".join, zip(texts, some, strict=True)))]
        lines.append(line + [above(gains[name].get(method, []), digits) for name in names])
    columns = ["above bn" if len(names) == 1 else f"{figures[name]}, above bn" for name in names]
    headings = ["method", "runs", *figures.values(), *columns]
    return tabulate(lines, headings, tablefmt="github", numalign="right")


def above(gains: Sequence[float], digits: int) -> str:
    """Give a mean difference and its standard error as text."""
    if not gains:
        return ""
    mean = f"{statistics.mean(gains):+.{digits}f}"
    if len(gains) == 1:
        return mean
    return f"{mean} +- {statistics.stdev(gains) / math.sqrt(len(gains)):.{digits}f}"


def draw_points(
    path: Path,
    records: Sequence[Record],
    figures: dict[str, str],
    title: str,
    unit: str = "accuracy, %",
) -> None:
    """Draw a column a figure, and in it, for each method, its runs and their mean."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["cell"]["method"] for record in records))
    wide = max(6.0, 1.5 + 0.2 * (len(names) + 1) * len(figures))
    canvas = Figure(figsize=(wide, 4.2), dpi=120)
    axes = canvas.subplots()
    step = 0.8 / len(names)
    for index, name in enumerate(names):
        colour, label, marker = f"C{index % 10}", str(name), MARKERS[index // 10 % len(MARKERS)]
        for column, key in enumerate(figures):
            values = [
                r[key] for r in records if r["cell"]["method"] == name and r.get(key) is not None
            ]
            if not values:
                continue
            x = column + (index - (len(names) - 1) / 2) * step
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(
                x, statistics.mean(values), error, fmt=marker, color=colour, label=label,
                markersize=5, capsize=3,
            )  # fmt: skip
            label = None
            axes.plot([x + 0.25 * step] * len(values), values, ".", color=colour, alpha=0.5)
    axes.set_xticks(range(len(figures)), list(figures.values()))
    axes.set_xlim(-0.5, len(figures) - 0.5)
    for column in range(1, len(figures)):
        axes.axvline(column - 0.5, color="0.85", linewidth=0.8)
    axes.grid(axis="y", color="0.9")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), title="method")
    with runs.atomic(path) as temporary:
        canvas.savefig(temporary, format="png", bbox_inches="tight")


@dataclass(kw_only=True)
class Report:
    """What a table and a picture are made of: records, and headings of the figures to show.

    Those of `more` are in the table alone. `compared` names figures of which the table has, in the
    last columns, by how much a method is above BatchNorm (`bn`) with the same seed.
    """

    records: Sequence[Record]
    figures: dict[str, str]
    title: str
    more: dict[str, str]
    compared: str | Sequence[str] | None = None
    digits: int = 1
    unit: str = "accuracy, %"

    def table(self) -> str:
        return table(self.records, {**self.figures, **self.more}, self.compared, self.digits)


def finish(folder: Path, text: str) -> None:
    """Write and print the report."""
    versions = runs.read_config(folder, "versions")
    made = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "command")
    runs.write_text(folder / "report.txt", f"{versions['command']}\n{made}\n\n{text}\n")
    print(text)
    print(f"{folder} is complete")


def show(
    folder: Path,
    records: Sequence[Record],
    figures: dict[str, str],
    title: str,
    more: dict[str, str] | None = None,
    compared: str | Sequence[str] | None = None,
    digits: int = 1,
    unit: str = "accuracy, %",
    notes: Sequence[str] = (),
) -> None:
    """End a run with a picture and a table of its figures; the table has `more`, and notes."""
    shown = [*figures, *(more or {})]
    kept = [{"cell": r["cell"], **{k: r[k] for k in shown if k in r}} for r in records]
    report = Report(
        records=kept, figures=figures, title=title, more=more or {}, compared=compared,
        digits=digits, unit=unit,
    )  # fmt: skip
    versions = runs.read_config(folder, "versions")
    runs.write_text(folder / TABLE, json.dumps({**asdict(report), "versions": versions}) + "\n")
    draw_points(folder / "results.png", kept, figures, title, unit)
    finish(folder, "\n\n".join([report.table(), *notes]))
