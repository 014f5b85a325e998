"""A context's statistics from unlabelled data: `adapt`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from normswap.errors import ConversionError, MissingContextError
from normswap.functional import context_moments, gaussian_divergence, instance_moments
from normswap.functional.moments import Moments
from normswap.graph.scope.use_context import use_context
from normswap.lifecycle.record import context_index, find_root, labelled_method, method_layers
from normswap.methods.base import Method
from normswap.util.batches import (
    check_stream,
    forward_batch,
    put_back_on_error,
    show_progress,
    undisturbed,
)
from normswap.util.distributed import sum_over


def adapt(
    model: nn.Module,
    loader: Iterable[Any],
    context: str | int | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Estimate the statistics of one context from data without targets, in place (AdaBN).

    One pass: every layer normalises a batch with that batch's own mean and biased variance, as
    batch norm does in training, so that deeper layers see what they will see; everything else,
    dropout too, is in eval mode. The context's statistics become the averages of the batches'
    means and unbiased variances, each batch with the same weight: what
    `torch.optim.swa_utils.update_bn` computes. CN takes them as running statistics, CN-X as mu and
    ``sigma = sqrt(var + eps)``; frozen layers too, since this asks for it.

    Nothing else changes: other contexts, further parameters and buffers, modes, torch's random
    state. Layers with statistics synchronised between processes average over all of them, which
    must then have equally many batches.

    Args:
        model: a model converted with a method that keeps statistics for each context.
        loader: yields batches of this context alone: a tensor; a tuple or list, whose first item
            is the input; or a dict of keyword arguments. Tensors are moved to the model's device.
        context: whose statistics, by name or index; needed where there are several.
        forward: called as ``forward(model, batch)`` instead, for any other kind of batch. It
            passes no labels.
        batches: how many to take; all by default.
        progress: show a bar on a terminal, if tqdm is installed.

    Returns:
        How far the statistics of each layer that was reached moved, by name, in nats; 0 for none.

    Raises:
        ConversionError: not a converted model, or without statistics of contexts (ACN: see
            `calibrate`); no batch, or only batches with a single value a channel; values that are
            not finite; a forward that passes other labels. The model is unchanged, as it is if the
            loader or the model fails or is interrupted.
        UnknownNameError, ContextError: no such context.
        MissingContextError: none given where there are several.

    Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", ICLR
    workshop 2017 (AdaBN).
    """
    root, record = find_root(model)
    method = labelled_method(record, "adapt (normswap.calibrate fits ACN to data)")
    names = record.contexts.names
    if context is None and len(names) > 1:
        raise MissingContextError(f"expected context= one of {', '.join(names)}, got none")
    index = 0 if context is None else context_index(record, context)
    check_stream(loader, forward, batches, progress)
    found = method_layers(root).items()
    layers = {name: layer for name, layer in found if method.statistics(layer) is not None}
    if not layers:
        raise ConversionError(
            f"method {record.method!r} names no statistics of contexts in {record.model}: a layer "
            "on an instance norm takes those of each instance, and a method of another package "
            "returns them from its statistics(layer)"
        )
    own = [t for m in layers.values() for t in (*m.parameters(False), *m.buffers(False))]
    averages = [Average(name, layer, method, index) for name, layer in layers.items()]
    with put_back_on_error(own), ExitStack() as hooks:
        for a in averages:
            hook = a.layer.register_forward_pre_hook(a.observe, with_kwargs=True)
            hooks.enter_context(hook)
        with undisturbed(root), _uncompiled(root), torch.no_grad(), use_context(root, index):
            for batch in show_progress(loader, "adapt", batches, progress):
                (forward or forward_batch)(root, batch)
        return _finish(averages, names[index])


class Average:
    """The average statistics of what enters a layer, which normalises each batch by its own."""

    def __init__(self, name: str, layer: nn.Module, method: Method, index: int) -> None:
        self.name, self.layer, self.method, self.index = name, layer, method, index
        statistics = method.statistics(layer) or ()
        self.before = Moments(*(t[index].detach().clone() for t in statistics))
        self.total = [torch.zeros_like(t, dtype=torch.float64) for t in self.before]
        self.calls = self.count = 0

    @torch.no_grad()
    def observe(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run as a forward pre-hook of the layer."""
        x = args[0] if args else kwargs["input"]
        given = args[1] if len(args) > 1 else kwargs.get("context")
        given = layer.scope.lookup() if given is None else layer.scope.resolve(given, x.device)
        if given is None or not bool((given.labels == self.index).all()):
            raise ConversionError(
                f"expected a forward that passes no labels, got other labels at {self.name}"
            )
        if x.dim() < 2 or x.shape[1] != layer.num_features:
            return  # the layer says so
        self.calls += 1
        reduce = sum_over(layer.process_group) if getattr(layer, "synced", False) else None
        rows = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        size = x.shape[2:].numel()
        counts, batch = context_moments(instance_moments(x), rows, 1, size, reduce)
        values, own = float(counts), Moments(batch.mean[0], batch.var[0])
        if values > 1:
            self.count += 1
            self.total[0] += own.mean
            self.total[1] += own.var * (values / (values - 1))
        # One value has no spread: the batch is normalised as far as is known.
        self.method.set_moments(layer, self.index, own if values > 1 else self.average())

    def average(self) -> Moments:
        """Return the averages, or the statistics before where there was no batch."""
        if not self.count:
            return self.before
        return Moments(*(t / self.count for t in self.total))


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run modules that were compiled in place as they are written: hooks may not reach graphs."""
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def _finish(averages: list[Average], name: str) -> dict[str, float]:
    """Set the averages; return how far each is from what was there."""
    reached = [a for a in averages if a.calls]
    if not reached:
        raise ConversionError(
            f"no batch reached a layer with statistics of context {name!r}; the loader may be empty"
        )
    empty = [a.name for a in reached if not a.count]
    if empty:
        raise ConversionError(
            f"expected more than one value a channel in some batch at {', '.join(empty[:5])}, got "
            "single values only, which have no spread; use larger batches"
        )
    moved: dict[str, float] = {}
    for a in reached:
        after = a.average()
        if not all(bool(t.isfinite().all()) for t in after):
            raise ConversionError(f"values that are not finite enter {a.name}")
        a.method.set_moments(a.layer, a.index, after)
        pairs = (torch.stack([old.double(), new]) for old, new in zip(a.before, after, strict=True))
        half = torch.full((2,), 0.5, dtype=torch.float64, device=after.mean.device)
        moved[a.name] = gaussian_divergence(Moments(*pairs), half)
    return moved
