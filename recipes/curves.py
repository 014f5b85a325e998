"""A picture of a run: loss and accuracy by epoch."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from normswap import plot

from .data import DomainData
from .tables import columns
from .training import Arm


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
    losses = {arm.name: [record["arms"][arm.name]["loss"] for record in history] for arm in arms}
    means = {
        heading: [
            statistics.mean(record["arms"][arm]["accuracy"][kind][d] for d in data.contexts)
            for record in history
        ]
        for arm, kind, heading in columns(arms)
    }
    panels = {"training loss": losses, "test accuracy, mean of trained domains, %": means}
    epochs = [record["epoch"] for record in history]
    plot.curves(panels, epochs, log=["training loss"], title=title, path=path)
