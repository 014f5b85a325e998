"""Fit the mixtures of ACN layers to the data that reaches them."""

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, expect_module
from normswap.functional.mixture_fit import fit_mixture
from normswap.functional.mixture_start import free_logits
from normswap.functional.moments import Moments, instance_moments
from normswap.methods.acn_layer import AdaptiveContextNorm
from normswap.util.arguments import check_count
from normswap.util.batches import (
    Reservoir,
    check_stream,
    forward_batch,
    keep_values,
    put_back_on_error,
    show_progress,
    undisturbed,
)

_MOST_STEPS = 1_000_000


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
    samples: int = 1024,
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Fit the mixture of every ACN layer to its inputs, in place.

    Streams batches through the model in eval mode and keeps a uniform sample of what enters each
    layer (a reservoir); then fits lambda, mu and sigma to it, and takes the running statistics
    from the fitted components.

    This changes the function: values are now normalised by the component they belong to. What is
    kept is the mean and the standard deviation of each output channel over the sample, by gamma
    and beta, so that the layers above still meet inputs of the size they know; and the direction,
    by the sign of gamma. The result of this function says how much changed. Every layer is fitted
    to what it received before any of them changed.

    Args:
        model: a model converted with method "acn", or one that holds `AdaptiveContextNorm`.
        loader: yields batches: a tensor; a tuple or list, whose first item is the input; or a dict
            of keyword arguments. Tensors are moved to the model's device.
        forward: called as ``forward(model, batch)`` instead, for any other kind of batch.
        batches: how many to take; all by default.
        samples: values kept a channel, at least 2 per component. Memory: 4 bytes times samples
            times the channels of all ACN layers, twice that with ``assignment="instance"``.
        steps: passes of expectation maximisation over the sample.
        seed: of the sample and of the first centres. torch's own generators are left as they were.
        progress: show a bar on a terminal, if tqdm is installed.

    Returns:
        For each layer by name, the mean squared change of its output over the sample, as a share
        of the output's variance.

    Raises:
        ConversionError: no ACN layer, or none that a batch reached; values that are not finite;
            too few samples. The model is unchanged, as it is if the loader or the model fails.
    """
    expect_module(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdaptiveContextNorm)}
    if not layers:
        raise ConversionError(
            f"found no AdaptiveContextNorm in {type(model).__name__}; convert it with "
            "method='acn' first"
        )
    most = max(layer.options.components for layer in layers.values())
    check_count("samples", samples, 2 * most, sys.maxsize)
    check_count("steps", steps, 1, _MOST_STEPS)
    check_count("seed", seed, -(2**63), 2**64 - 1)
    check_stream(loader, forward, batches, progress)
    generator = torch.Generator().manual_seed(seed)
    kept = {name: Reservoir(samples, generator) for name in layers}
    with undisturbed(model), torch.no_grad():
        with ExitStack() as hooks:
            for name, layer in layers.items():
                observe = partial(_observe, kept[name])
                hooks.enter_context(layer.register_forward_pre_hook(observe))
            for batch in show_progress(loader, "calibrate", batches, progress):
                (forward or forward_batch)(model, batch)
        reached = {n: rows for n in layers if (rows := kept[n].rows) is not None}
        if not reached:
            raise ConversionError("no batch reached an ACN layer; the loader may be empty")
        with put_back_on_error(t for n in reached for t in layers[n].state_dict().values()):
            return {n: _fit(n, layers[n], x, steps, generator) for n, x in reached.items()}


def _observe(kept: Reservoir, layer: AdaptiveContextNorm, inputs: tuple[Tensor]) -> None:
    x = inputs[0].detach()
    if layer.options.assignment != "instance":
        keep_values(kept, x)
        return
    # Two values with the mean and the spread of the instance stand for it.
    mean, var = instance_moments(x)
    x = torch.stack([mean - var.sqrt(), mean + var.sqrt()], 2)
    kept.add(len(x), lambda index: x[index.to(x.device)])


def _fit(
    name: str, layer: AdaptiveContextNorm, sample: Tensor, steps: int, generator: torch.Generator
) -> float:
    """Fit one layer; return the share of its output that changed."""
    options = layer.options
    if len(sample) < 2 * options.components:
        raise ConversionError(
            f"expected at least {2 * options.components} samples at {name}, got {len(sample)}"
        )
    if not bool(sample.isfinite().all()):
        raise ConversionError(f"values that are not finite enter {name}; the model is unchanged")
    old = layer.compute(sample, False).y
    values = sample.mean(2) if options.assignment == "instance" else sample
    joint = options.assignment == "position"
    priors, moments = fit_mixture(values, options.components, layer.eps, joint, steps, generator)
    _set(layer, priors, moments)
    if layer.running_mean is not None or options.assignment == "instance":
        owned = layer.compute(sample, True).moments
        if layer.running_mean is not None:
            layer.set_values({"running_mean": owned.mean, "running_var": owned.var})
        else:
            # The one sigma of a component both assigns means and normalises values: the latter.
            _set(layer, priors, owned)
    weight = layer.weight.to(old.dtype, copy=True)
    layer.set_values({"weight": torch.ones_like(weight), "bias": torch.zeros_like(weight)})
    layer.set_values(_match(old, layer.compute(sample, False).y, weight))
    change = _over(old - layer.compute(sample, False).y).square().mean(0)
    spread = _over(old).var(0, correction=0)
    return float(change.sum() / spread.sum().clamp(min=torch.finfo(spread.dtype).tiny))


def _set(layer: AdaptiveContextNorm, priors: Tensor, moments: Moments) -> None:
    log_sigma = 0.5 * moments.var.clamp(min=layer.eps).log()
    layer.set_values(
        {"prior_logits": free_logits(priors), "mu": moments.mean, "log_sigma": log_sigma}
    )


def _over(y: Tensor) -> Tensor:
    """Return values (samples, C)."""
    return y if y.dim() == 2 else y.movedim(1, 2).flatten(0, 1)


def _match(old: Tensor, new: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return gamma and beta that give `new` the mean, spread and direction of `old`."""
    old, new = _over(old), _over(new)
    sizes = [y.std(0, correction=0) for y in (old, new)]
    along = ((old - old.mean(0)) * (new - new.mean(0))).mean(0)
    ratio = torch.where(along < 0, -1, 1) * sizes[0] / sizes[1].clamp(min=1e-12)
    # Without spread there is nothing to match: a dead channel keeps its gamma.
    ratio = torch.where(sizes[1] > 1e-6, ratio, weight)
    return {"weight": ratio, "bias": old.mean(0) - ratio * new.mean(0)}
