"""What CN's kernels compute, with torch's operators: for second derivatives."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional import context
from normswap.functional.affine import Centred, centre_norm
from normswap.functional.moments import Moments, context_posterior, instance_moments
from normswap.functional.segments import Counts
from normswap.functional.tables import apply_centred


class Norm(NamedTuple):
    """What a layer of CN holds.

    Attributes:
        weight: (K, C).
        bias: (K, C).
        priors: (K,).
        running: moments, (K, C), of contexts with fewer than two values in the batch.
        moved: the running moments that this batch is to move; None for none.
        batches: how many moved them, (K,).
        eps: added to the variance.
        momentum: None for the average of all batches.
        pooled: which contexts, from and to, are pooled for samples without a label; (0, 0) where
            there must be none, None where the host knows that there is none.
        weighs: whether samples without a label, instead, weigh the contexts, each for itself.
    """

    weight: Tensor
    bias: Tensor
    priors: Tensor
    running: Moments
    moved: Moments | None
    batches: Tensor
    eps: float
    momentum: float | None
    pooled: tuple[int, int] | None
    weighs: bool


def norm_by_formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    known: Moments | None,
    labels: Tensor,
    batched: bool,
) -> Tensor:
    """Return x normalised, given the moments that were used.

    ``norm.running`` has these, (K + 1, C); ``known`` those, (K, C), that samples without a label
    weighed, if they did.
    """
    contexts, dtype, used = len(weight), norm.running.mean.dtype, norm.running
    priors = norm.priors.to(dtype).unsqueeze(1)
    low, high = norm.pooled or (0, contexts)
    share = priors[low:high] / priors[low:high].sum()
    gain, shift = (t.to(dtype) * priors.rsqrt() for t in (weight, bias))
    gain, shift = (
        torch.cat((t, (share * t[low:high]).sum(0, keepdim=True))) for t in (gain, shift)
    )
    index = torch.where(labels < 0, contexts, labels).clamp(max=contexts)
    mix = None
    if known is not None:
        # Nothing has written row K of what was used.
        pairs = zip(used, known, strict=True)
        used = Moments(*(torch.cat((t[:contexts], row[:1])) for t, row in pairs))
        mix = partial(_mix, index, known, priors.squeeze(1), norm.eps)
    if batched:
        given = (gain, shift, torch.ones_like(gain[:, :1]), used, contexts, norm.eps, _ignore)
        return context.norm_contexts(x, index, *given, override=mix)
    table = centre_norm(used, gain, shift, norm.eps)
    if mix is None:
        return apply_centred(x, table, index)
    return apply_centred(x, mix(table.rows(index), instance_moments(x), gain, shift))


def _mix(
    index: Tensor,
    known: Moments,
    priors: Tensor,
    eps: float,
    table: Centred,
    instances: Moments,
    gain: Tensor,
    shift: Tensor,
) -> Centred:
    """Give samples without a label, whose index is K, the map that their weights mix."""
    contexts = len(priors)
    weights = context_posterior(instances, known, priors, eps)
    mixed = centre_norm(known, gain[:contexts], shift[:contexts], eps).mix(weights)
    return table.where(index < contexts, mixed)


def _ignore(used: Moments, counts: Counts) -> None:
    """Note nothing: a derivative moves no statistics."""
