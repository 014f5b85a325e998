"""A picture of a run: loss and accuracy by epoch."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .data import DomainData
from .runs import atomic
from .tables import columns
from .training import Arm

COLOURS = ("#4c4c4c", "#0072b2", "#d55e00", "#009e73")


def draw_curves(
    path: Path, history: list[dict[str, Any]], arms: list[Arm], data: DomainData, title: str
) -> None:
    """Draw the training loss and the mean test accuracy over the trained domains.

    Args:
        path: the PNG to write.
        history: one record an epoch.
        arms: the models of the run.
        data: the data set, for its domains.
        title: heading of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would choose a window system and keep the figure alive.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    colours = {arm.name: COLOURS[index % len(COLOURS)] for index, arm in enumerate(arms)}
    for arm in arms:
        losses = [record["arms"][arm.name]["loss"] for record in history]
        left.plot(epochs, losses, marker="o", color=colours[arm.name], label=arm.name)
    for arm_name, kind, heading in columns(arms):
        means = [
            statistics.mean(record["arms"][arm_name]["accuracy"][kind][d] for d in data.contexts)
            for record in history
        ]
        hidden = kind == "unknown" and arm_name in {n for n, k, _ in columns(arms) if k == "known"}
        right.plot(
            epochs,
            means,
            marker="o",
            linestyle="--" if hidden else "-",
            color=colours[arm_name],
            label=heading,
        )
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy, mean of trained domains, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle(title)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
