"""What labels say about a batch: how many values each context has, counted once for all layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.backend import is_eager
from normswap.functional.labels import kept
from normswap.functional.moments import segment_mean, segment_sum


class Counts(NamedTuple):
    """Values in a channel of each context.

    Attributes:
        values: (K, 1).
        usable: whether they have a variance: more than one, (K, 1).
        unbias: n / (n - 1), what makes a biased variance unbiased, (K, 1).
        every: whether the host knows that all are usable.
    """

    values: Tensor
    usable: Tensor
    unbias: Tensor
    every: bool = False


def count(values: Tensor) -> Counts:
    """Return the counts of so many values, (K, 1)."""
    return Counts(values, values > 1, values / (values - 1).clamp_(min=1))


class Segments(NamedTuple):
    """The instances of each context.

    Attributes:
        rows: the context of each instance, (N,) in [0, K).
        instances: how many each context has, (K, 1); 0 where they are not pooled.
        counts: values of all.
        minus_share: less what a value has in the mean of its context, 0 where that is not used.
    """

    rows: Tensor
    instances: Tensor
    counts: Counts
    minus_share: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the instances of each context, (K, C), of values (N, C)."""
        return segment_mean(values, self.rows, self.instances)


def segments(labels: Tensor, batched: int, total: int, size: int, dtype: torch.dtype) -> Segments:
    """Return the instances of each context.

    Args:
        labels: (N,), in [0, batched), or -1 for one context more.
        batched: contexts that are pooled; the first so many.
        total: K, `batched` or one more.
        size: values in a channel of an instance.
        dtype: of counts.
    """

    def make() -> Segments:
        # Backward needs them as they are now, whatever the caller writes into the labels.
        rows = labels.clone() if total == batched else torch.where(labels < 0, batched, labels)
        ones = labels.new_ones((len(labels), 1), dtype=dtype)
        instances = segment_sum(ones, rows, total)
        instances[batched:] = 0
        counts = count(instances * size)
        if labels.device.type == "cpu" and type(labels) is Tensor and is_eager():
            counts = counts._replace(every=bool(counts.usable.all()))
        minus_share = counts.usable / counts.values.clamp(min=1).neg_()
        return Segments(rows, instances, counts, minus_share)

    return kept(labels, (segments, batched, total, size, dtype), make)
