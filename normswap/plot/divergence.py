"""How far the contexts' statistics have moved apart, layer by layer: a heat map."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, not_converted
from normswap.functional.moments import gaussian_divergences
from normswap.lifecycle.record import find_inside, weights_of
from normswap.methods.base import Method, get_method
from normswap.plot.canvas import Axes, Figure, check_path, close, open_axes, shorten
from normswap.util.extras import need

FEW_COLUMNS = 8
MANY_LAYERS = 120


def divergence(
    source: nn.Module | Mapping[str, Tensor],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how far each context's statistics are from the pooled ones, in every layer.

    A row is a layer; a column is a context (a component, for a method without
    labels). A cell is the Kullback-Leibler divergence of the context's Gaussian from the pooled
    one, the mean over channels, in nats; colours follow its root. All is 0 at conversion.

    Args:
        source: a converted model, or a module that holds one; or the divergences themselves, layer
            -> (K,).
        names: of the contexts; the model's by default.
        title: above the map.
        ax: axes to draw in, instead of a new figure.
        path: where to write the picture.

    Returns:
        The figure.

    Raises:
        ConversionError: no converted model, none of its layers has statistics of contexts, or
            values that do not fit together.
        NormswapError: matplotlib is missing, or `path` cannot be written.
    """
    check_path(path)
    if isinstance(source, nn.Module):
        rows, own_names, heading = model_divergences(source)
        names, title = names or own_names, title or heading
        kind = "layer, in the model's order"
    elif isinstance(source, Mapping):
        rows, kind = dict(source), "layer"
    else:
        raise ConversionError(
            "expected a converted model, or a mapping from layers to divergences, got "
            f"{type(source).__name__}"
        )
    table = _table(rows)
    labels = [f"context {k}" for k in range(table.shape[1])] if names is None else list(names)
    if len(labels) != table.shape[1]:
        raise ConversionError(f"expected {table.shape[1]} names, one a column, got {len(labels)}")
    colours = need("matplotlib.colors", "plot", "plotting")
    count, columns = table.shape
    size = (4.2 + 0.62 * min(columns, 24), 1.7 + 0.165 * min(count, MANY_LAYERS))
    figure, (axes,) = open_axes(ax, 1, 1, size)
    most = float(table.max())
    norm = colours.PowerNorm(0.5, vmin=0, vmax=most if most > 0 else 1)
    image = axes.imshow(table.numpy(), aspect="auto", cmap="viridis", norm=norm)
    axes.set_xticks(range(columns), [shorten(name, 24) for name in labels])
    slanted = max(map(len, labels)) > (12 if columns <= 4 else 7)
    axes.tick_params(axis="x", rotation=35 if slanted else 0, labelsize=8)
    if slanted:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    step = -(-count // MANY_LAYERS)
    axes.set_yticks(range(0, count, step), [shorten(name) for name in list(rows)[::step]])
    axes.tick_params(axis="y", labelsize=6.5, length=2)
    axes.set_ylabel(kind + f" (1 in {step} named)" * (step > 1))
    if columns <= FEW_COLUMNS and step == 1:
        for y, row in enumerate(table.tolist()):
            for x, value in enumerate(row):
                text = "0" if value == 0 else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"
                shade = "black" if norm(value) > 0.6 else "white"
                axes.text(x, y, text, ha="center", va="center", fontsize=5.5, color=shade)
    axes.set_title(title or "Divergence of contexts, by layer", fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=40)
    bar.set_label("divergence from the pooled statistics, nats a channel", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return close(figure, path)


def model_divergences(model: nn.Module) -> tuple[dict[str, Tensor], list[str], str]:
    """Return the divergences of a converted model by layer, (K,), names of columns, and a title."""
    found = find_inside(model)
    if found is None:
        raise not_converted(model)
    root, record = found
    method = get_method(record.method)
    rows: dict[str, Tensor] = {}
    kept = [r for r in record.rows if r.action in ("replaced", "inserted")]
    for row in kept if isinstance(method, Method) else ():
        assert isinstance(method, Method)
        layer = root.get_submodule(row.layer or row.fqn)
        moments = method.statistics(layer)
        if moments is not None and not moments.mean.is_meta:
            weights = weights_of(record, method, layer).to(moments.mean.device)
            rows[row.fqn or "(root)"] = gaussian_divergences(moments, weights).mean(1).cpu()
    without = len(kept) - len(rows)
    if not rows:
        raise ConversionError(
            f"no layer of this model has statistics of contexts (method {record.method!r}), so "
            "there is no divergence to draw"
        )
    components = [f"component {k}" for k in range(len(next(iter(rows.values()))))]
    names = list(record.contexts.names) if method.needs_context else components
    note = f"\n{without} layers keep no statistics and are not shown" if without else ""
    return rows, names, f"{record.model}, {record.method}: divergence by layer{note}"


def _table(rows: Mapping[str, Tensor]) -> Tensor:
    values = [
        torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        for value in rows.values()
    ]
    if not values or any(v.dim() != 1 or v.shape != values[0].shape for v in values):
        shapes = sorted({tuple(v.shape) for v in values})
        raise ConversionError(f"expected layers with one value a context each, got {shapes}")
    table = torch.stack(values)
    fine = (table.isfinite() & (table >= 0)).all(1)
    if not table.numel() or not bool(fine.all()):
        bad = [name for name, well in zip(rows, fine, strict=True) if not well]
        raise ConversionError(f"expected finite divergences of 0 or more, not so in {bad[:4]}")
    return table
