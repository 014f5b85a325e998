"""CN-X by Triton: two launches forward, two backward.

Where samples without a label weigh the contexts, each for itself, three, of which one is for their
moments, and four: one for the weights' gradients, and one as the moments of x move with it.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.functional.affine import Centred
from normswap.functional.moments import Moments, context_posterior, instance_moments, pool_moments
from normswap.functional.tables import apply_centred
from normswap.functional.triton import learned_kernels
from normswap.functional.triton.context_launches import Kernels
from normswap.functional.triton.context_launches import Norm as Norm
from normswap.functional.triton.context_launches import normalize as normalize
from normswap.functional.triton.recording import Tensors


def _values(instances: int, rows: int, contexts: int, channels: int, weighs: bool) -> int:
    """Return how many values all tables have; `learned_kernels.split_rest` says which."""
    return 4 * rows * channels + weighs * instances * (2 * channels + contexts)


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x, mu, log_sigma, weight, bias), (priors, index, _), norm = inputs, kept, given[0]
    contexts, rows = len(mu), index[: len(x)]
    low, high = norm.pooled or (0, contexts)
    mean, spread = mu.float(), log_sigma.float()
    moments = Moments(mean, (2 * spread).exp())
    share = priors[low:high].float() / priors[low:high].float().sum()
    pooled = pool_moments(Moments(*(t[low:high] for t in moments)), share)
    inverse = torch.cat((torch.exp(-spread), pooled.var.rsqrt()))
    scale = inverse if weight is None else weight.float() * inverse
    shift = torch.zeros_like(scale) if bias is None else bias.float().expand_as(scale)
    table = Centred(torch.cat((mean, pooled.mean)), scale, shift)
    if not norm.weighs:
        return apply_centred(x, table, rows)
    weights = context_posterior(instance_moments(x), moments, share, 0.0)
    mixed = Centred(*(t[:contexts] for t in table)).mix(weights)
    return apply_centred(x, table.rows(rows.clamp(max=contexts)).where(rows < contexts, mixed))


KERNELS = Kernels(
    _values,
    learned_kernels.tables,
    learned_kernels.gradients,
    _formula,
    learned_kernels.weight_gradients,
)
