"""A picture of a grid of trainings: every run a dot, mean and spread over seeds beside it."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import atomic

MARKERS = "Ds^v"


def draw_points(
    path: Path,
    records: Sequence[dict[str, Any]],
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
    with atomic(path) as temporary:
        canvas.savefig(temporary, format="png", bbox_inches="tight")
