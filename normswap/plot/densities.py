"""The components of a layer over the activations that reach it."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from normswap.errors import ConversionError
from normswap.functional.moments import Moments, gaussian_divergences
from normswap.lifecycle.record import find_inside
from normswap.methods.acn_layer import AdaptiveContextNorm
from normswap.methods.base import Method, get_method
from normswap.plot.canvas import COLOURS, Axes, Figure, check_path, close, open_axes
from normswap.util.arguments import listed
from normswap.util.batches import Reservoir, forward_batch, keep_values, show_progress, undisturbed

BINS = 60


class Components(NamedTuple):
    """Gaussians for each channel, all (K, C).

    Attributes:
        weight: sums to one over K.
        mean: of each.
        sigma: standard deviation of each, positive.
        names: of the K, () for their numbers.
    """

    weight: Tensor
    mean: Tensor
    sigma: Tensor
    names: tuple[str, ...] = ()


def densities(
    source: nn.Module | Components,
    data: Iterable[Any] | Tensor | None,
    layer: str = "",
    *,
    channels: int | Sequence[int] = 6,
    samples: int = 5000,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    title: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the weighted densities of a layer's components over a histogram of its inputs.

    Of ACN, lambda_k N(mu_k, sigma_k), the mixture that assigns values; of CN and CN-X, prior times
    the Gaussian of each context. Where the black line, their sum, follows the histogram, the
    components describe the data.

    Args:
        source: a converted model; or components.
        data: for a model, a loader whose batches are run in eval mode, as `normswap.calibrate`
            takes them, a uniform sample of the layer's inputs being kept; for components, values
            (S, C), or None for the densities alone.
        layer: name of the layer in the model.
        channels: which, or how many: those whose components are furthest apart.
        samples: values to keep a channel.
        forward: called as ``forward(model, batch)`` instead, for any other kind of batch.
        seed: of the sample.
        progress: show a bar on a terminal, if tqdm is installed.
        title: above all panels.
        ax: axes to draw in, one a channel, instead of a new figure.
        path: where to write the picture.

    Returns:
        The figure.

    Raises:
        ConversionError: no such layer or channel, no batch, values that are not finite.
        NormswapError: matplotlib is missing, or `path` cannot be written.
    """
    check_path(path)
    if isinstance(source, nn.Module):
        parts = find_components(source, layer)
        kept = Reservoir(samples, torch.Generator().manual_seed(seed))
        hook = source.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs: keep_values(kept, inputs[0].detach())
        )
        stream = [] if data is None else data
        with hook, undisturbed(source), torch.no_grad():
            for batch in show_progress(stream, "activations", progress=progress):
                (forward or forward_batch)(source, batch)
        if kept.rows is None or not len(kept.rows):
            raise ConversionError(f"no batch reached {layer}; the loader may be empty")
        data = kept.rows
    elif isinstance(source, Components):
        parts = source
    else:
        raise ConversionError(
            f"expected a converted model or Components, got {type(source).__name__}"
        )
    weight, mean, sigma = (t.detach().double().cpu() for t in parts[:3])
    parts = Components(weight, mean, sigma, parts.names)
    values = (
        None if data is None else torch.as_tensor(data, dtype=torch.float64, device="cpu").detach()
    )
    chosen = _choose(parts, values, channels)
    columns = min(len(chosen), 3)
    rows = -(-len(chosen) // columns)
    figure, axes = open_axes(ax, len(chosen), columns, (3.9 * columns, 2.9 * rows + 0.4))
    for number, (channel, panel) in enumerate(zip(chosen, axes, strict=True)):
        _draw(panel, parts, None if values is None else values[:, channel], channel)
        if number % columns == 0:
            panel.set_ylabel("density, per unit of the input")
        if number >= len(chosen) - columns:
            panel.set_xlabel("input of the layer")
    over = "" if values is None else f" over its inputs, {len(values):,} values a channel"
    heading = f"components of {layer or 'a layer'}{over}"
    figure.suptitle(title or heading, fontsize=11)
    return close(figure, path)


def find_components(model: nn.Module, layer: str) -> Components:
    """Return the components of a layer of a converted model; an error lists those that have any."""
    inside = find_inside(model)
    record: Any = None if inside is None else inside[1]
    method = None if record is None else get_method(record.method)
    found: dict[str, Components] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptiveContextNorm):
            mixture = module.mixture(torch.float64)
            weight = mixture.log_prior.exp().expand_as(mixture.mean)
            found[name] = Components(weight, mixture.mean, mixture.log_sigma.exp())
        elif isinstance(method, Method) and (moments := method.statistics(module)) is not None:
            mean, sigma = moments.mean, moments.var.clamp(min=1e-12).sqrt()
            weight = record.contexts.priors.to(mean)[:, None].expand_as(mean)
            found[name] = Components(weight, mean, sigma, record.contexts.names)
    if layer not in found:
        names = listed(found, 8)
        raise ConversionError(
            f"expected layer= of a layer with components, got {layer!r}; the layers are: "
            + (names or "none, the model holds no CN, CN-X or ACN")
        )
    return found[layer]


def _choose(parts: Components, values: Tensor | None, channels: int | Sequence[int]) -> list[int]:
    """Check what is to be drawn, and return the channels."""
    shape = parts.mean.shape
    fits = parts.mean.dim() == 2 and parts.weight.shape == shape and parts.sigma.shape == shape
    if not fits or not bool((parts.sigma > 0).all()):
        raise ConversionError(
            f"expected components with weight, mean and positive sigma (K, C), got "
            f"{[tuple(t.shape) for t in parts[:3]]}"
        )
    if values is not None:
        if values.dim() != 2 or values.shape[1] != shape[1] or not len(values):
            raise ConversionError(f"expected values (S, {shape[1]}), got {tuple(values.shape)}")
        if not bool(values.isfinite().all()):
            raise ConversionError("expected finite values, got some that are not")
    if not isinstance(channels, int):
        chosen = list(channels)
        if not chosen or not all(0 <= channel < shape[1] for channel in chosen):
            raise ConversionError(f"expected channels in [0, {shape[1]}), got {chosen}")
        return chosen
    if channels < 1:
        raise ConversionError(f"expected at least one channel, got {channels}")
    moments = Moments(parts.mean, parts.sigma.square())
    apart = (parts.weight * gaussian_divergences(moments, parts.weight)).sum(0)
    return sorted(apart.topk(min(channels, shape[1])).indices.tolist())


def _draw(panel: Axes, parts: Components, values: Tensor | None, channel: int) -> None:
    weight, mean, sigma = (t[:, channel] for t in parts[:3])
    if values is None:
        low, high = float((mean - 3 * sigma).min()), float((mean + 3 * sigma).max())
    else:
        ordered, last = values.sort().values, len(values) - 1
        low, high = (float(ordered[round(share * last)]) for share in (0.005, 0.995))
    margin = 0.08 * (high - low) or float(sigma.max())
    low, high = low - margin, high + margin
    if values is not None:
        width = (high - low) / BINS
        shares = torch.histc(values, BINS, low, high) / (len(values) * width)
        edges = [low + k * width for k in range(BINS)]
        panel.bar(edges, shares.tolist(), width, align="edge", color="#d0d0d0")
    grid = torch.linspace(low, high, 400, dtype=torch.float64, device="cpu")
    gaussians: Any = Normal(mean[:, None], sigma[:, None])
    each = weight[:, None] * gaussians.log_prob(grid).exp()
    panel.plot(grid.tolist(), each.sum(0).tolist(), color="black", linewidth=1.6, label="sum")
    for k, line in enumerate(each.tolist()):
        name = parts.names[k] if parts.names else f"{k}"
        label = f"{name}: {100 * float(weight[k]):.0f} %"
        style = {"linestyle": ("-", "--", ":")[k // len(COLOURS) % 3], "linewidth": 1.3}
        panel.plot(grid.tolist(), line, color=COLOURS[k % len(COLOURS)], label=label, **style)
    if values is not None:
        # A component on a spike would flatten the histogram; it is cut off instead.
        tallest = float(shares.max())
        panel.set_ylim(0, 1.15 * max(tallest, min(float(each.sum(0).max()), 1.5 * tallest)))
    panel.set_title(f"channel {channel}", fontsize=9)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=6.5, title="component: weight", title_fontsize=6.5)
