"""The plain norm that a layer equals, and the rows of a context that starts like another."""

from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.moments import Moments, pool_moments


class PlainNorm(NamedTuple):
    """What a plain norm computes in eval mode: ``weight * (x - mean) / sqrt(var + eps) + bias``.

    Attributes:
        mean, var: (C,); None where each instance has its own.
        weight, bias: (C,).
        batches: how many batches the statistics have seen, (); None where nothing counts them.
    """

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor
    bias: Tensor
    batches: Tensor | None = None


def pick(table: Tensor, context: int | None, priors: Tensor) -> Tensor:
    """Return the row of a context, or the mean row for None; (K, C) to (C,), in float64."""
    table = table.detach().double()
    return priors.double() @ table if context is None else table[context]


def pick_moments(moments: Moments, context: int | None, priors: Tensor) -> Moments:
    """Return the moments of a context, or of the mixture for None; (K, C) to (C,), in float64."""
    moments = Moments(*(t.detach().double() for t in moments))
    if context is None:
        moments, context = pool_moments(moments, priors.double()), 0
    return Moments(moments.mean[context], moments.var[context])


def added_prior(priors: Tensor, share: float) -> Tensor:
    """Return the prior to append so that its share of the sum is `share`, () float64.

    The others stay, so that nothing which divides by their roots changes. The values then no
    longer sum to one; their ratios are the probabilities.
    """
    return torch.mul(priors.detach().double().sum(), share / (1 - share))
