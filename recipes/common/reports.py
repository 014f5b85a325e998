"""How a grid of trainings ends: a picture, a table, and what both are made of.

That is table.json, the figures of each method and seed, for `python -m recipes results`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from . import runs

MARKERS = "Ds^v"
TABLE = "table.json"
BASELINE = "bn"
Record = dict[str, Any]
Compared = str | Sequence[str] | None


def spread(values: Sequence[float], digits: int = 1) -> str:
    deviation = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def above(gains: Sequence[float], digits: int) -> str:
    """Give a mean difference and its standard error as text."""
    if not gains:
        return ""
    root = math.sqrt(len(gains))
    error = f" +- {stdev(gains) / root:.{digits}f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.{digits}f}{error}"


def differences(records: Sequence[Record], figure: str) -> dict[str, list[float]]:
    """Give by method how much its figure is above BatchNorm's, in the trainings they share."""
    plain: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    keyed = [({**r["cell"]}, r[figure]) for r in records]
    others = [(cell.pop("method"), repr(cell), value) for cell, value in keyed]
    plain = {cell: value for method, cell, value in others if method == BASELINE}
    for method, cell, value in others:
        if method != BASELINE and cell in plain:
            found.setdefault(method, []).append(value - plain[cell])
    return found


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["cell"]["method"], []).append(record)
    return found


def values_of(records: Sequence[Record], figure: str) -> list[float]:
    return [r[figure] for r in records if r.get(figure) is not None]


def table(
    records: Sequence[Record], figures: dict[str, str], compared: Compared = None, digits: int = 1
) -> str:
    """Tabulate figures of each method as mean and standard deviation over its seeds.

    A figure in `compared` has a column more: the mean of its differences from BatchNorm's of the
    same seed, and their standard error, the deviation over the root of their number.
    """
    names = [compared] if isinstance(compared, str) else compared or ()
    gains = {name: differences(records, name) for name in names}
    lines = []
    for method, group in by_method(records).items():
        line: list[Any] = [method, len(group)]
        for values in (values_of(group, name) for name in figures):
            some = f" ({len(values)} of {len(group)})" if 0 < len(values) < len(group) else ""
            line.append((spread(values, digits) if values else "-") + some)
        lines.append(line + [above(gains[name].get(method, []), digits) for name in names])
    columns = ["above bn" if len(names) == 1 else f"{figures[name]}, above bn" for name in names]
    headings = ["method", "runs", *figures.values(), *columns]
    return tabulate(lines, headings, tablefmt="github", numalign="right")


def draw_points(
    path: Path, records: Sequence[Record], figures: dict[str, str], title: str,
    unit: str = "accuracy, %",
) -> None:  # fmt: skip
    """Draw a column a figure, and in it, for each method, its runs and their mean."""
    from matplotlib.figure import Figure

    groups = by_method(records)
    wide = max(6.0, 1.5 + 0.2 * (len(groups) + 1) * len(figures))
    canvas = Figure(figsize=(wide, 4.2), dpi=120)
    axes = canvas.subplots()
    step = 0.8 / len(groups)
    for index, (name, group) in enumerate(groups.items()):
        how = {"color": f"C{index % 10}", "fmt": MARKERS[index // 10 % len(MARKERS)], "capsize": 3}
        label: str | None = str(name)
        for column, values in enumerate(values_of(group, key) for key in figures):
            if values:
                x = column + (index - (len(groups) - 1) / 2) * step
                error = stdev(values) if len(values) > 1 else 0.0
                axes.errorbar(x, mean(values), error, label=label, markersize=5, **how)
                dots = [x + 0.25 * step] * len(values)
                axes.plot(dots, values, ".", color=how["color"], alpha=0.5)
                label = None
    axes.set_xticks(range(len(figures)), list(figures.values()))
    axes.set_xlim(-0.5, len(figures) - 0.5)
    for column in range(1, len(figures)):
        axes.axvline(column - 0.5, color="0.85", linewidth=0.8)
    axes.grid(axis="y", color="0.9")
    axes.set(ylabel=unit, title=title)
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
    compared: Compared = None
    digits: int = 1
    unit: str = "accuracy, %"

    def table(self) -> str:
        return table(self.records, {**self.figures, **self.more}, self.compared, self.digits)

    def draw(self, path: Path) -> None:
        draw_points(path, self.records, self.figures, self.title, self.unit)


def finish(folder: Path, text: str) -> None:
    versions = runs.read_config(folder, "versions")
    made = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "command")
    runs.write_text(folder / "report.txt", f"{versions['command']}\n{made}\n\n{text}\n")
    print(text)
    print(f"{folder} is complete")


def show(
    folder: Path, records: Sequence[Record], figures: dict[str, str], title: str,
    more: dict[str, str] | None = None, compared: Compared = None, digits: int = 1,
    unit: str = "accuracy, %", notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """End a run with a picture and a table of its figures; the table has `more`, and notes."""
    more = more or {}
    shown = [*figures, *more]
    kept = [{"cell": r["cell"], **{k: r[k] for k in shown if k in r}} for r in records]
    headings = {"figures": figures, "title": title, "more": more, "unit": unit}
    report = Report(records=kept, compared=compared, digits=digits, **headings)
    found = {**asdict(report), "versions": runs.read_config(folder, "versions")}
    runs.write_text(folder / TABLE, json.dumps(found) + "\n")
    report.draw(folder / "results.png")
    finish(folder, "\n\n".join([report.table(), *notes]))
