"""CN-X by Triton's kernels: two launches forward, two backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional import kernels
from normswap.functional.affine import Centred
from normswap.functional.moments import Moments, pool_moments
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton import cnx_kernels, rows_kernels, sweeps
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Rows, plan
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
    y: Tensor = _LearnedNorm.apply(x, *learned, priors, pooled, index)
    return y


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


class _LearnedNorm(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, *learned, priors, pooled, index = inputs
        tables, contexts = (
            _make_tables(x, Learned(*learned), priors, pooled, index),
            len(learned[0]),
        )
        ctx.pooled = pooled
        ctx.save_for_backward(x, *learned, priors, index, tables)
        return sweeps.affine_of(x, tables, index, contexts + 1, contexts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, *learned, priors, index, tables = ctx.saved_tensors
        needed, pooled = ctx.needs_input_grad, ctx.pooled
        if torch.is_grad_enabled():
            given, labels = Learned(*learned), index[: len(x)]
            pulled = _differentiate(x, given, priors, pooled, labels, grads[0], needed[:5])
            return *pulled, None, None, None
        mu, log_sigma, weight, _ = learned
        p, dy, (contexts, channels) = plan(x), kernels.match(grads[0], x), mu.shape
        instances, _, _ = p.shape
        dx = torch.empty_like(x) if needed[0] else None
        found = x.new_empty(2 * instances * p.splits * channels, dtype=torch.float32)
        numbers = (contexts + 1, contexts, *p.geometry)
        over_x = (dy, x, dx, found, tables, index, numbers)
        launch(rows_kernels.dots, p.programs, *over_x, **p.blocks)
        pulled = [None if t is None else torch.empty_like(t) for t in learned]
        cut = Rows(contexts + (weight is not None), channels)
        launch(
            cnx_kernels.pull,
            cut.programs,
            *(found, index, tables, mu, log_sigma, priors, *pulled),
            (*(pooled or (0, 0)), instances, contexts, channels, p.splits),
            **cut.blocks,
        )
        return dx, *pulled, None, None, None


def _differentiate(
    x: Tensor,
    learned: Learned,
    priors: Tensor,
    pooled: tuple[int, int] | None,
    labels: Tensor,
    dy: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients with a graph of their own, for second derivatives."""
    # As views: of inputs that depend on each other, each is to be held fixed for the others.
    given = [None if t is None else t.view_as(t) for t in learned]
    (mu, log_sigma, weight, bias), x = Learned(*given), x.view_as(x)  # type: ignore[arg-type]
    contexts = len(mu)
    low, high = pooled or (0, contexts)
    with torch.autocast(x.device.type, enabled=False):
        mean, spread = mu.float(), log_sigma.float()
        share = priors[low:high].float() / priors[low:high].float().sum()
        pool = pool_moments(Moments(mean[low:high], (2 * spread[low:high]).exp()), share)
        inverse = torch.cat((torch.exp(-spread), pool.var.rsqrt()))
        scale = inverse if weight is None else weight.float() * inverse
        shift = torch.zeros_like(scale) if bias is None else bias.float().expand_as(scale)
        table = Centred(torch.cat((mean, pool.mean)), scale, shift)
        y = apply_centred(x, table, labels)
    wanted = [t for t, need in zip((x, *given), needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
