"""CN by Triton's kernels: three launches forward in training, three backward; two in evaluation.

One more in evaluation where samples without a label weigh the contexts, for their moments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.functional.affine import Centred, centre_norm
from normswap.functional.moments import Moments, context_posterior, instance_moments
from normswap.functional.norm_contexts import norm_contexts
from normswap.functional.segments import Counts, count
from normswap.functional.tables import apply_centred
from normswap.functional.triton import cn_kernels
from normswap.functional.triton.context_launches import Kernels, Norm
from normswap.functional.triton.context_launches import normalize as normalize
from normswap.functional.triton.recording import Tensors


def note_moments(note: Callable[..., None], x: Tensor, tables: Tensor, norm: Norm) -> None:
    """Call with the moments each context is normalised with, and its number of values."""
    used, values, _ = _moments(x, tables, norm)
    note(Moments(*(t[:-1] for t in used)), count(values[:-1].unsqueeze(1)))


def _values(instances: int, rows: int, contexts: int, channels: int, weighs: bool) -> int:
    """Return how many values all tables have; `cn_kernels.split_rest` says which."""
    known = contexts * (2 * channels + instances) if weighs else 0
    return (3 * rows + 2 * (contexts + 1)) * channels + 2 * _line(contexts) + known


def _line(contexts: int) -> int:
    """Return the room of a value for each of K + 1 rows, in whole lines of 16."""
    return (contexts + 16) // 16 * 16


def _moments(x: Tensor, tables: Tensor, norm: Norm) -> tuple[Moments, Tensor, Moments | None]:
    """Return the moments that were used, (K + 1, C), their number of values, and those compared."""
    contexts, channels = norm.learned[0].shape
    rows = contexts + (len(x) if norm.weighs else 1)
    size = (contexts + 1) * channels
    rest = tables[3 * rows * channels :]
    used = Moments(*(t.view(-1, channels) for t in (tables[:size], rest[size : 2 * size])))
    values = rest[2 * size :][: contexts + 1]
    known = rest[2 * (size + _line(contexts)) :][: 2 * contexts * channels]
    compared = Moments(*known.view(2, contexts, channels)) if len(known) else None
    return used, values, compared


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x, weight, bias), (priors, index, tables), norm = inputs, kept, given[0]
    contexts, labels, eps = len(weight), index[: len(x)], norm.rates[0]
    used, _, known = _moments(x, tables, norm)
    dtype, (low, high) = used.mean.dtype, norm.pooled or (0, contexts)
    priors = priors.to(dtype).unsqueeze(1)
    share = priors[low:high] / priors[low:high].sum()
    affine = (t.to(dtype) * priors.rsqrt() for t in (weight, bias))
    gain, shift = (torch.cat((t, (share * t[low:high]).sum(0, keepdim=True))) for t in affine)
    labels = torch.where(labels < 0, contexts, labels).clamp(max=contexts)
    mix = None
    if known is not None:
        # Nothing has written row K of what was used.
        pairs = zip(used, known, strict=True)
        used = Moments(*(torch.cat((t[:contexts], row[:1])) for t, row in pairs))
        mix = partial(_mix, labels, known, priors.squeeze(1), eps)
    if norm.batched:
        rest = (torch.ones_like(gain[:, :1]), used, contexts, eps, _ignore)
        return norm_contexts(x, labels, gain, shift, *rest, override=mix)
    table = centre_norm(used, gain, shift, eps)
    if mix is None:
        return apply_centred(x, table, labels)
    return apply_centred(x, mix(table.rows(labels), instance_moments(x), gain, shift))


def _mix(
    labels: Tensor, known: Moments, priors: Tensor, eps: float,
    table: Centred, instances: Moments, gain: Tensor, shift: Tensor,
) -> Centred:  # fmt: skip
    """Give samples without a label, whose index is K, the map that their weights mix."""
    contexts = len(priors)
    weights = context_posterior(instances, known, priors, eps)
    mixed = centre_norm(known, gain[:contexts], shift[:contexts], eps).mix(weights)
    return table.where(labels < contexts, mixed)


def _ignore(used: Moments, counts: Counts) -> None:
    """Note nothing: a derivative moves no statistics."""


KERNELS = Kernels(
    _values, cn_kernels.tables, cn_kernels.gradients, _formula, move=cn_kernels.apply_and_move
)
