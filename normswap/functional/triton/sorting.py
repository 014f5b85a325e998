"""Instances sorted by context, so that kernels walk those of a context in a fixed order."""

import torch
from torch import Tensor

from normswap.functional.labels import kept


def find_rows(labels: Tensor, contexts: int) -> Tensor:
    """Return the row of each instance n, (N,): that of its context, or K + n where it has none."""

    def make() -> Tensor:
        own = torch.arange(contexts, contexts + len(labels), device=labels.device)
        return torch.where(labels < 0, own, labels)

    return kept(labels, (find_rows, contexts), make)


def sort_labels(labels: Tensor, contexts: int, own_rows: bool = False) -> Tensor:
    """Return the instances sorted by context, once for all layers that the labels meet.

    Labels are (N,) in [-1, K); nothing waits for their device. One after the other lie: the row of
    each instance, (N,), its context, or K, or, with own rows, as `find_rows` returns them; the
    instances by context, (N,), -1 last; and where in these a context starts, (K + 2,).
    """

    def sort() -> Tensor:
        number = len(labels)
        packed = labels.new_empty(2 * number + contexts + 2)
        rows, order, offsets = packed.split_with_sizes([number, number, contexts + 2])
        torch.remainder(labels, contexts + 1, out=rows)  # -1 becomes K
        found = torch.empty_like(rows)
        torch.sort(rows, stable=True, out=(found, order))
        starts = torch.arange(contexts + 2, device=labels.device)
        torch.searchsorted(found, starts, out=offsets)
        if own_rows:
            rows.copy_(find_rows(labels, contexts))
        return packed

    return kept(labels, (sort_labels, contexts, own_rows), sort)
