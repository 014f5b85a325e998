"""Figures without pyplot, which would choose a window system and keep every figure alive."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from normswap.errors import NormswapError
from normswap.util.extras import need
from normswap.util.whole_file import write_whole

# Okabe and Ito's colours, which all kinds of colour vision tell apart, the dark ones first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4c4c4c")
GREY = "#4c4c4c"
DPI = 140

# matplotlib's types are not there where it is not installed.
Axes: TypeAlias = Any
Figure: TypeAlias = Any


def open_axes(
    ax: Axes | Sequence[Axes] | None,
    count: int,
    columns: int,
    size: tuple[float, float],
    widths: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes: those given, or a new grid.

    Args:
        ax: axes of the caller, one or a sequence; None for a new figure.
        count: how many are needed.
        columns: of a new grid.
        size: of a new figure, in inches.
        widths: of the columns, relative.

    Raises:
        NormswapError: another number of axes was given, or matplotlib is missing.
    """
    module = need("matplotlib.figure", "plot", "plotting")
    if ax is not None:
        given = list(ax) if isinstance(ax, Sequence) or hasattr(ax, "ravel") else [ax]
        if len(given) != count:
            raise NormswapError(f"expected ax= with {count} axes, one a panel, got {len(given)}")
        return given[0].get_figure(), given
    figure = module.Figure(figsize=size, layout="constrained")
    need("matplotlib.backends.backend_agg", "plot", "plotting").FigureCanvasAgg(figure)
    rows, ratios = -(-count // columns), {"width_ratios": widths} if widths else None
    axes = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios).ravel())
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def close(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure, if a path is given, whole or not at all; return it."""
    if path is None:
        return figure
    target = Path(path)
    kinds = figure.canvas.get_supported_filetypes()
    kind = target.suffix.lower().removeprefix(".")
    if kind not in kinds:
        raise NormswapError(
            f"expected path= with an ending among {', '.join(sorted(kinds))}, got {target}"
        )
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=DPI)
    try:
        write_whole(target, picture.getvalue())
    except OSError as error:
        raise NormswapError(f"cannot write {target}: {error}") from error
    return figure


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Refuse a path in a folder that is not there, before the work is done."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise NormswapError(f"cannot write {path}: there is no folder {Path(path).parent}")


def shorten(name: str, most: int = 34) -> str:
    """Return a name with its middle left out where it is long."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
