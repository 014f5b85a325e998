"""Training curves: one panel a quantity, one line a model."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

from normswap.errors import NormswapError
from normswap.plot.canvas import COLOURS, Axes, Figure, check_path, close, open_axes

STYLES = ("-", "--", ":", "-.")
Lines = Mapping[str, Sequence[float | None]]


def curves(
    panels: Mapping[str, Lines],
    x: Sequence[float] | None = None,
    *,
    xlabel: str = "epoch",
    log: Sequence[str] = (),
    title: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the curves of a run.

    Lines whose names agree up to the first comma ("cn, label known" and "cn, label unknown") share
    a colour and differ in their dashes, as does a name in all panels.

    Args:
        panels: quantity with its unit, the label of a panel's y axis -> line -> values; None leaves
            a gap.
        x: where the values are, as many; 1, 2, ... by default.
        xlabel: what x is.
        log: quantities on a logarithmic scale.
        title: above all panels.
        ax: axes to draw in, one a panel, instead of a new figure.
        path: where to write the picture.

    Returns:
        The figure.

    Raises:
        NormswapError: no panels, values that do not match x, matplotlib is missing, or `path`
            cannot be written.
    """
    check_path(path)
    lengths = {len(values) for lines in panels.values() for values in lines.values()}
    wanted = lengths if x is None else {len(x)}
    if len(wanted) != 1 or lengths != wanted or wanted == {0}:
        raise NormswapError(
            f"expected curves of one length, at least 1, got lengths {sorted(lengths)}"
            + ("" if x is None else f" for {len(x)} places on the x axis")
        )
    (count,) = wanted
    places = list(range(1, count + 1)) if x is None else list(x)
    if not all(isinstance(place, int | float) for place in places):
        raise NormswapError(f"expected numbers on the x axis, got {places[:6]}")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = open_axes(ax, len(panels), columns, (5 * columns, 3.8 * rows))
    families = dict.fromkeys(name.partition(",")[0] for lines in panels.values() for name in lines)
    colours = {family: COLOURS[k % len(COLOURS)] for k, family in enumerate(families)}
    for (quantity, lines), panel in zip(panels.items(), axes, strict=True):
        members: Counter[str] = Counter()
        for name, values in lines.items():
            family, shown = name.partition(",")[0], [math.nan if v is None else v for v in values]
            style = {"color": colours[family], "linestyle": STYLES[members[family] % len(STYLES)]}
            marker = {"marker": "o" if count <= 40 else None, "markersize": 4}
            panel.plot(places, shown, label=name, **style, **marker)
            members[family] += 1
        panel.set(xlabel=xlabel, ylabel=quantity, yscale="log" if quantity in log else "linear")
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(
            integer=all(float(p).is_integer() for p in places)
        )
        panel.legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return close(figure, path)
