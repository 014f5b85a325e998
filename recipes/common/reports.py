"""How a grid of trainings ends: a picture, a table, and what both are made of.

That is table.json, the figures of each method and seed, for `python -m recipes results`.
"""

import json
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
RATE = {"rate": "rate, 1e-3"}
Record = dict[str, Any]
Compared = str | Sequence[str] | None


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Give a mean and the deviation of the values as text."""
    deviation = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def above(gains: Sequence[float], digits: int) -> str:
    """Give a mean difference and its standard error as text."""
    error = f" +- {stdev(gains) / len(gains) ** 0.5:.{digits}f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.{digits}f}{error}" if gains else ""


def differences(records: Sequence[Record], figure: str) -> dict[str, list[float]]:
    """Give by method how much its figure is above BatchNorm's, in the trainings they share."""
    found: dict[str, list[float]] = {}
    plain = {rest_of(r): r[figure] for r in records if r["cell"]["method"] == BASELINE}
    for r in records:
        if rest_of(r) in plain and r["cell"]["method"] != BASELINE:
            gain = r[figure] - plain[rest_of(r)]
            found.setdefault(r["cell"]["method"], []).append(gain)
    return found


def rest_of(record: Record) -> str:
    """Name what a training shares with those of other methods."""
    return repr({key: value for key, value in record["cell"].items() if key != "method"})


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
        colour, marker = f"C{index % 10}", MARKERS[index // 10 % len(MARKERS)]
        beside = (index - (len(groups) - 1) / 2) * step
        found = [(column + beside, values_of(group, key)) for column, key in enumerate(figures)]
        found = [(x, values) for x, values in found if values]
        at, means = [x for x, _ in found], [mean(values) for _, values in found]
        errors = [stdev(values) if len(values) > 1 else 0.0 for _, values in found]
        how = {"fmt": marker, "markersize": 5, "capsize": 3, "color": colour}
        axes.errorbar(at, means, errors, label=str(name) if found else None, **how)
        for x, values in found:
            axes.plot([x + 0.25 * step] * len(values), values, ".", color=colour, alpha=0.5)
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
    more: dict[str, str] | None = None, compared: Compared = None, notes: Sequence[str] = (),
    **how: Any,
) -> None:  # fmt: skip
    """End a run with a picture and a table of its figures, see `Report`, and notes.

    Of a run that chose rates the table has them. Beside the figures the seconds of a training are
    kept, which no table shows.
    """
    settings = runs.read_config(folder)
    chosen = settings.get("tune") is not None or "rates" in settings
    more = {**(RATE if chosen else {}), **(more or {})}
    shown = [*figures, *more, "seconds"]
    kept = [{"cell": r["cell"], **{k: r[k] for k in shown if k in r}} for r in records]
    given = {"figures": figures, "title": title, "more": more, "compared": compared}
    report = Report(records=kept, **given, **how)
    found = {**asdict(report), "versions": runs.read_config(folder, "versions")}
    runs.write_text(folder / TABLE, json.dumps(found) + "\n")
    report.draw(folder / "results.png")
    finish(folder, "\n\n".join([report.table(), *notes]))
