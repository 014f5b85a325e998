"""Which places of CrossNorm fired in which forwards."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, expect_module
from normswap.functional.schedule import Schedule
from normswap.methods.crossnorm import CrossNorm
from normswap.plot.canvas import COLOURS, GREY, Axes, Figure, check_path, close, open_axes, shorten
from normswap.util.batches import undisturbed
from normswap.util.extras import need


@dataclass
class Firings:
    """What fired: a row a forward.

    Attributes:
        names: of the places.
        p: probability that a forward has places that fire.
        active: how many then do.
        rows: for each forward, which fired.
    """

    names: list[str]
    p: float
    active: int
    rows: list[set[int]] = field(default_factory=list)

    def table(self) -> Tensor:
        """Return (places, forwards) bool."""
        table = torch.zeros(len(self.names), len(self.rows), dtype=torch.bool, device="cpu")
        for forward, fired in enumerate(self.rows):
            table[list(fired), forward] = True
        return table


@contextmanager
def record_firing(model: nn.Module) -> Iterator[Firings]:
    """Record which places fire in the forwards that are run meanwhile, in training.

    Forwards that `torch.compile` made draw inside their graph and are not seen.

    Args:
        model: converted by a method with CrossNorm.

    Yields:
        Firings, filled forward by forward.

    Raises:
        ConversionError: no such model.
    """
    schedule, names = find_schedule(model)
    record = Firings(names, schedule.p, schedule.active)
    asked: set[int] = set()
    begin, fires = schedule.begin, schedule.fires

    def begin_row(device: torch.device | None = None) -> None:
        asked.clear()
        begin(device)

    def note(site: int, device: torch.device | None = None) -> bool | Tensor:
        answer = fires(site, device)
        # A recomputation in backward repeats an answer; a tensor is an answer of a graph.
        if isinstance(answer, bool) and torch._C._current_graph_task_id() == -1:
            if not asked or site in asked:
                asked.clear()
                record.rows.append(set())
            asked.add(site)
            if answer:
                record.rows[-1].add(site)
        return answer

    patched: Any = schedule
    patched.begin, patched.fires = begin_row, note
    try:
        yield record
    finally:
        del patched.begin, patched.fires


def simulate_firing(model: nn.Module, forwards: int, seed: int) -> Firings:
    """Draw what a copy of the model's schedule draws in so many forwards, without running them."""
    if forwards < 1:
        raise ConversionError(f"expected forwards= of at least 1, got {forwards}")
    schedule, names = find_schedule(model)
    record = Firings(names, schedule.p, schedule.active)
    drawn = copy.deepcopy(schedule)
    with undisturbed(seed=seed):
        for _ in range(forwards):
            drawn.begin()
            record.rows.append({site for site in range(len(names)) if drawn.fires(site)})
            drawn.end()
    return record


def find_schedule(model: nn.Module) -> tuple[Schedule, list[str]]:
    """Return the schedule of a converted model, and its places' names in their order."""
    expect_module(model)
    found: dict[int, str] = {}
    schedule = None
    for name, module in model.named_modules():
        if isinstance(module, CrossNorm) and module.schedule is not None:
            schedule = schedule or module.schedule
            if module.schedule is schedule:
                found[module.index] = name
    if schedule is None:
        raise ConversionError(
            f"expected a model with CrossNorm, got {type(model).__name__}; convert it with "
            "method='crossnorm' or 'cnsn'"
        )
    return schedule, [found.get(k, f"place {k}") for k in range(schedule.num_sites)]


def firing(
    source: nn.Module | Firings,
    *,
    forwards: int = 100,
    seed: int = 0,
    title: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw which places of CrossNorm fired in which forwards, and how often each did.

    Args:
        source: what `record_firing` recorded; or a converted model, whose schedule is then drawn
            from without running the model.
        forwards: how many to draw for a model.
        seed: of these draws.
        title: above the map.
        ax: two axes to draw in, map and shares, or one for the map alone, instead of a new figure.
        path: where to write the picture.

    Returns:
        The figure.

    Raises:
        ConversionError: a model without CrossNorm, or a record without forwards.
        NormswapError: matplotlib is missing, or `path` cannot be written.
    """
    check_path(path)
    drawn = not isinstance(source, Firings)
    record = source if isinstance(source, Firings) else simulate_firing(source, forwards, seed)
    if not record.rows:
        raise ConversionError(
            "expected a record of forwards, got an empty one; run the model in training, not "
            "compiled, inside `with normswap.plot.record_firing(model) as record:`"
        )
    table = record.table()
    places, count = table.shape
    panels = 2 if ax is None or isinstance(ax, Sequence) or hasattr(ax, "ravel") else 1
    size = (10.5, 1.5 + 0.17 * max(places, 8))
    figure, axes = open_axes(ax, panels, 2, size, widths=(5, 1))
    colours = need("matplotlib.colors", "plot", "plotting")
    pair = colours.ListedColormap(["#f2f2f2", COLOURS[0]])
    shown = {"aspect": "auto", "cmap": pair, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    axes[0].imshow(table.numpy(), extent=(0.5, count + 0.5, places - 0.5, -0.5), **shown)
    axes[0].set_yticks(range(places), [shorten(name) for name in record.names])
    axes[0].tick_params(axis="y", labelsize=6.5, length=2)
    silent = sum(not fired for fired in record.rows)
    axes[0].set(
        xlabel=f"forward in training{' (drawn, not run)' if drawn else ''}; none fired in {silent} "
        f"of {count}",
        ylabel="place, in the model's order",
    )
    heading = f"CrossNorm fires at {record.active} of {places} places with probability {record.p:g}"
    axes[0].set_title(title or heading, fontsize=10)
    if panels == 2:
        shares = 100 * table.double().mean(1)
        axes[1].barh(range(places), shares.tolist(), color=COLOURS[0], height=0.8)
        expected = 100 * record.p * record.active / places
        axes[1].axvline(expected, color=GREY, linestyle="--", label=f"expected {expected:.2g} %")
        axes[1].set(ylim=(places - 0.5, -0.5), yticks=[], xlabel="fired, % of forwards")
        axes[1].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return close(figure, path)
