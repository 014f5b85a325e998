"""The plain norm that a layer equals, and the rows of a context that starts like another."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from normswap.functional.moments import Moments, pool_moments, widen
from normswap.sites import Site


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


def affine_tensors(source: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a layer, ones and zeros where it lacks them."""
    ones = torch.ones(site.num_features, device=site.device, dtype=site.dtype)
    weight, bias = getattr(source, "weight", None), getattr(source, "bias", None)
    weight, bias = ones if weight is None else weight, 0 * ones if bias is None else bias
    return weight.detach(), bias.detach()


def is_trained(norm: nn.Module) -> bool:
    """Return whether a norm's running statistics have moved; False where it has no values."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or var is None or mean.is_meta:
        return False
    return bool((mean != 0).any()) or bool((var != 1).any())


def pick(table: Tensor, context: int | None, priors: Tensor) -> Tensor:
    """Return the row of a context, or the mean row for None; (K, C) to (C,), in `wide_dtype`."""
    table = widen(table.detach())
    return widen(priors) @ table if context is None else table[context]


def pick_moments(moments: Moments, context: int | None, priors: Tensor) -> Moments:
    """Return the moments of a context, or of the mixture for None, (C,) in `wide_dtype`."""
    moments = Moments(*(widen(t.detach()) for t in moments))
    if context is None:
        moments, context = pool_moments(moments, widen(priors)), 0
    return Moments(moments.mean[context], moments.var[context])


def added_prior(priors: Tensor, share: float) -> Tensor:
    """Return the prior to append so that its share of the sum is `share`, () in `wide_dtype`.

    The others stay, so that nothing which divides by their roots changes. The values then no
    longer sum to one; their ratios are the probabilities.
    """
    return torch.mul(widen(priors.detach()).sum(), share / (1 - share))
