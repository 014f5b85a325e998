"""CN-X by Triton's kernels: two launches forward, two backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.affine import Centred
from normswap.functional.moments import Moments, pool_moments
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton import cnx_kernels, rows_kernels, sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Rows, plan
from normswap.functional.triton.recording import Way, record
from normswap.functional.triton.sorting import sort_labels


class Learned(NamedTuple):
    """What a layer of CN-X learns: mu and log sigma, (K, C), weight and bias, (C,) or None."""

    mu: Tensor
    log_sigma: Tensor
    weight: Tensor | None
    bias: Tensor | None


def norm_learned(
    x: Tensor,
    labels: Tensor | None,
    learned: Learned,
    priors: Tensor,
    pooled: tuple[int, int] | None,
) -> Tensor:
    """Return x normalised with the learned statistics of each instance's context.

    Args:
        x: (N, C, *).
        labels: (N,) in [-1, K); or (1,), that of all; None where all are -1.
        learned: see there.
        priors: (K,).
        pooled: see `normswap.functional.triton.cn.Norm`.
    """
    contexts = learned.mu.shape[0]
    if not records((x, *(t for t in learned if t is not None))):
        tables = _make_tables(x, learned, priors, pooled, None)
        return sweeps.affine_of(x, tables, labels, contexts + 1, contexts)
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    index = sort_labels(labels.expand(x.shape[0]), contexts).packed
    return record(_WAY, (priors, pooled, index), x, *learned)


def _make_tables(
    x: Tensor,
    learned: Learned,
    priors: Tensor,
    pooled: tuple[int, int] | None,
    index: Tensor | None,
) -> Tensor:
    """Return centre, scale, shift and 1 / sigma of contexts and the pool, (4, K + 1, C)."""
    contexts, channels = learned.mu.shape
    found = x.new_empty(4 * (contexts + 1) * channels, dtype=torch.float32)
    cut = Rows(contexts + (pooled is not None), channels)
    launch(
        cnx_kernels.tables,
        cut.programs,
        *(*learned, priors, index, found),
        (*(pooled or (0, 0)), x.shape[0], contexts, channels),
        **cut.blocks,
    )
    return found


def _forward(inputs: Sequence[Any], given: Any) -> tuple[Tensor, ...]:
    (x, *learned), (priors, pooled, index) = inputs, given
    contexts, tables = len(learned[0]), _make_tables(x, Learned(*learned), priors, pooled, index)
    return sweeps.affine_of(x, tables, index, contexts + 1, contexts), priors, index, tables


def _backward(
    dy: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor], given: Any, needed: Any
) -> tuple[Tensor | None, ...]:
    (x, *learned), (priors, index, tables), pooled = inputs, kept, given[1]
    mu, log_sigma, weight, _ = learned
    p, dy, (contexts, channels) = plan(x), kernels.match(dy, x), mu.shape
    instances, _, _ = p.shape
    dx = torch.empty_like(x) if needed[0] else None
    found = x.new_empty(2 * instances * p.splits * channels, dtype=torch.float32)
    numbers = (contexts + 1, contexts, *p.geometry)
    launch(rows_kernels.dots, p.programs, dy, x, dx, found, tables, index, numbers, **p.blocks)
    pulled = [None if t is None else torch.empty_like(t) for t in learned]
    cut = Rows(contexts + (weight is not None), channels)
    launch(
        cnx_kernels.pull,
        cut.programs,
        *(found, index, tables, mu, log_sigma, priors, *pulled),
        (*(pooled or (0, 0)), instances, contexts, channels, p.splits),
        **cut.blocks,
    )
    return dx, *pulled


def _formula(inputs: Sequence[Any], kept: Sequence[Tensor], given: Any) -> Tensor:
    (x, mu, log_sigma, weight, bias), (priors, index, _) = inputs, kept
    low, high = given[1] or (0, len(mu))
    mean, spread = mu.float(), log_sigma.float()
    share = priors[low:high].float() / priors[low:high].float().sum()
    pool = pool_moments(Moments(mean[low:high], (2 * spread[low:high]).exp()), share)
    inverse = torch.cat((torch.exp(-spread), pool.var.rsqrt()))
    scale = inverse if weight is None else weight.float() * inverse
    shift = torch.zeros_like(scale) if bias is None else bias.float().expand_as(scale)
    return apply_centred(x, Centred(torch.cat((mean, pool.mean)), scale, shift), index[: len(x)])


_WAY = Way(_forward, _backward, _formula)
