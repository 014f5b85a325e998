"""Measure running statistics anew over a loader, for each context."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.errors import ConversionError, expect_module
from normswap.graph.scope.use_context import use_context
from normswap.lifecycle.record import find_inside
from normswap.methods.instance import ContextInstanceNorm
from normswap.methods.layer import ContextLayer
from normswap.methods.running import RUNNING
from normswap.methods.selfnorm import SelfNorm
from normswap.util.arguments import describe
from normswap.util.batches import (
    check_stream,
    forward_batch,
    put_back_on_error,
    show_progress,
    undisturbed,
)


def update_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    labels: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Measure running statistics anew: the plain average over the batches, in place.

    What `torch.optim.swa_utils.update_bn` does, and the last epoch of Lightning's
    `StochasticWeightAveraging`, which find BatchNorm alone: after weights were averaged, or edited,
    statistics are those of other weights. Covers CN (each context from its
    own samples), ACN, SelfNorm, and batch and instance norms that were not replaced; frozen ones
    stay. Those layers run in training mode, the rest of the model in eval mode.

    Args:
        model: a converted model, or a module that holds one.
        loader: yields batches: a tensor; a tuple or list, whose first item is the input; or a dict
            of keyword arguments. Tensors are moved to the model's device.
        labels: position of the context labels in a batch that is a tuple or list. A dict has them
            under the name of the forward's argument.
        forward: called as ``forward(model, batch)`` instead, for any other kind of batch.
        batches: how many to take; all by default.
        progress: show a bar on a terminal, if tqdm is installed.

    Returns:
        For each context, how many batches counted for it, at the layer where fewest did; empty for
        methods without contexts. A context with none keeps its statistics, and a warning names it.

    Raises:
        ConversionError: no layer whose running statistics may move, or none that a batch reached;
            batches without an item at `labels`; values that are not finite.
        MissingContextError: a layer that needs labels got none. Whatever is raised, the model is
            as it was.

    Warns:
        UserWarning: a context that no batch counted for; or a converted model without running
            statistics, such as one of CN-X, of which nothing is measured and no batch is taken.
    """
    expect_module(model)
    named = {name: m for name, m in model.named_modules() if _is_measured(m)}
    layers = list(named.values())
    check_stream(loader, forward, batches, progress)
    if not layers and find_inside(model) is not None and not any(map(_is_tracked, model.modules())):
        warnings.warn(
            f"nothing to measure: no layer in {type(model).__name__} has running statistics; what "
            "CN-X normalises with is learned, and CrossNorm draws from the batch",
            stacklevel=2,
        )
        return {}
    if not layers:
        raise ConversionError(
            f"found no layer in {type(model).__name__} whose running statistics may move; "
            "normswap.freeze(stats='update') lets frozen ones move again; those of layers of other "
            "packages are not measured"
        )
    buffers = [b for layer in layers for b in _buffers(layer)]
    run = forward or forward_batch
    with torch.no_grad(), undisturbed(model), put_back_on_error(buffers) as before:
        with _measuring(model, layers) as counts:
            for batch in show_progress(loader, "update_stats", batches, progress):
                given = None if labels is None else _labels_in(batch, labels)
                with nullcontext() if given is None else use_context(model, given):
                    run(model, batch)
        met = [_met(layer, counts[layer]) for layer in layers]
        if not any(bool(m.any()) for m in met):
            raise ConversionError(
                "no batch reached a layer with running statistics, or each had one value a "
                "channel; the loader may be empty"
            )
        for name, layer in named.items():
            if not all(bool(b.isfinite().all()) for b in _buffers(layer)):
                raise ConversionError(f"values that are not finite enter {name or 'the layer'}")
        for layer, seen in zip(layers, met, strict=True):
            for buffer in _buffers(layer):
                rows = seen.reshape(seen.shape + (1,) * (buffer.dim() - seen.dim()))
                buffer.copy_(torch.where(rows, buffer, before[buffer]))
    return _report(layers, met)


def _labels_in(batch: Any, position: int) -> Any:
    if not isinstance(batch, tuple | list):
        raise ConversionError(
            f"expected batches as tuples with context labels at position {describe(position)} "
            f"(labels=), got {type(batch).__name__}"
        )
    if type(position) is not int or not -len(batch) <= position < len(batch):
        raise ConversionError(
            f"expected labels= as a position in batches of {len(batch)} items, "
            f"got {describe(position)}"
        )
    return batch[position]


def _buffers(layer: nn.Module) -> list[Tensor]:
    return [b for n, b in layer.named_buffers(recurse=False) if n in RUNNING]


def _is_tracked(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor)


def _is_measured(module: nn.Module) -> bool:
    if not _is_tracked(module):
        return False
    if hasattr(type(module), "stats_frozen"):
        return not (module.stats_frozen or getattr(module, "frozen", False))
    return isinstance(module, _NormBase) and "train" not in vars(module)


def _is_cumulative(layer: nn.Module) -> bool:
    """Return whether a layer averages over batches by itself where its momentum is None."""
    alone = isinstance(layer, _InstanceNorm | ContextInstanceNorm)
    return not alone and getattr(layer, "num_batches_tracked", None) is not None


@contextmanager
def _measuring(model: nn.Module, layers: list[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Let layers average over batches; yield how many each has met, where it cannot tell."""
    hosts = {gate: m for m in model.modules() if isinstance(m, SelfNorm) for gate in m.children()}
    counts: Counter[nn.Module] = Counter()

    def count(layer: nn.Module, least: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts[layer] += len(inputs[0]) >= least
        layer.momentum = 1 / max(counts[layer], 1)  # type: ignore[assignment]

    with ExitStack() as undo:
        for layer in layers:
            undo.callback(setattr, layer, "momentum", layer.momentum)
            layer.training = True
            for name, start in (("running_mean", 0.0), ("running_var", 1.0)):
                buffer = layer.get_buffer(name)
                buffer.copy_(torch.where(buffer.isfinite(), buffer, start))
            if _is_cumulative(layer):
                layer.get_buffer("num_batches_tracked").zero_()
                layer.momentum = None  # type: ignore[assignment]
            else:
                # A gate's statistics are over instances: a batch of one leaves them.
                least = 2 if layer in hosts else 1
                host = hosts.get(layer, layer)
                undo.enter_context(host.register_forward_pre_hook(partial(count, layer, least)))
        yield counts


def _met(layer: nn.Module, count: int) -> Tensor:
    """Return where statistics were measured: () for the whole layer, or (K,)."""
    if _is_cumulative(layer):
        return layer.get_buffer("num_batches_tracked") > 0
    return torch.tensor(count > 0, device=layer.get_buffer("running_mean").device)


def _report(layers: list[nn.Module], met: list[Tensor]) -> dict[str, int]:
    """Return the fewest batches that counted for each context, and warn of those with none."""
    least: dict[str, int] = {}
    for layer, seen in zip(layers, met, strict=True):
        if isinstance(layer, ContextLayer) and seen.dim():
            counts = (layer.get_buffer("num_batches_tracked") * seen).tolist()
            for name, count in zip(layer.names, counts, strict=True):
                least[name] = min(count, least.get(name, count))
    absent = [name for name, count in least.items() if count == 0]
    if absent:
        warnings.warn(
            f"at some layer no batch had two values a channel of {', '.join(absent)}; there these "
            "contexts keep the statistics they had",
            stacklevel=3,
        )
    return least
