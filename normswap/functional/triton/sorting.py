"""Instances sorted by context, so that kernels walk those of a context in a fixed order."""

from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.labels import kept


class SortedLabels(NamedTuple):
    """Instances by context.

    Attributes:
        labels: context of each instance, (N,); -1 for none.
        order: instances, (N,), by context; those without one last.
        offsets: where in `order` a context starts, (K + 2,); K is none.
    """

    labels: Tensor
    order: Tensor
    offsets: Tensor


def find_rows(labels: Tensor, contexts: int) -> Tensor:
    """Return the row of each instance n, (N,): that of its context, or K + n where it has none."""

    def make() -> Tensor:
        own = torch.arange(contexts, contexts + len(labels), device=labels.device)
        return torch.where(labels < 0, own, labels)

    return kept(labels, (find_rows, contexts), make)


def sort_labels(labels: Tensor, contexts: int) -> SortedLabels:
    """Return the instances sorted by context, once for all layers that the labels meet.

    On the device of the labels, (N,) in [-1, K); nothing waits for it.
    """

    def sort() -> SortedLabels:
        # -1 becomes K.
        found, order = labels.remainder(contexts + 1).sort(stable=True)
        starts = torch.arange(contexts + 2, device=labels.device)
        return SortedLabels(labels, order, torch.searchsorted(found, starts))

    return kept(labels, (sort_labels, contexts), sort)
