"""CN-X by Triton: two launches forward, two backward.

Tables are (K + 1, C); rows and pooled contexts are as in `cn_kernels`.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.affine import Centred
from normswap.functional.moments import Moments, pool_moments
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton import parts, sweeps, tile
from normswap.functional.triton.launching import BoundLaunch, launches_for
from normswap.functional.triton.plan import cut_rows, plan_of
from normswap.functional.triton.recording import Operator, Tensors, record
from normswap.functional.triton.sorting import sort_labels


@triton.jit(do_not_specialize=["low", "high", "N", "K"])
def tables(
    mu, log_sigma, weight, bias, priors, rows, found, low, high,
    N, K, C, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the map of each row, ``y = (x - centre) * scale + shift``, and 1 / sigma."""
    k, c, at, ok = parts.take_row(tl.program_id(0), C, BC)
    centre, scale, shift, inverse = parts.split(found, K + 1, C)
    near = tl.zeros([BC], tl.float32)
    left, inv = tl.zeros_like(near), tl.zeros_like(near)
    if k < K:
        near = tl.load(mu + at, ok, 0.0).to(tl.float32)
        inv = tl.exp(-tl.load(log_sigma + at, ok, 0.0).to(tl.float32))
    else:
        needed = True
        if rows is not None:
            offsets = rows + 2 * N + K
            needed = tl.load(offsets + 1) > tl.load(offsets)
        if needed:
            m, v, _, _ = parts.pool(mu, log_sigma, None, None, priors, low, high, c, C, True, BN)
            near = m.to(tl.float32)
            left = (m - near).to(tl.float32)
            inv = tl.rsqrt(v.to(tl.float32))
    gain, bias_k = inv, tl.zeros([BC], tl.float32)
    if weight is not None:
        gain *= tl.load(weight + c, ok, 0.0).to(tl.float32)
        bias_k = tl.load(bias + c, ok, 0.0).to(tl.float32)
    tl.store(centre + at, near, ok)
    tl.store(scale + at, gain, ok)
    # The shift makes up for what rounding leaves of the pooled mean.
    tl.store(shift + at, bias_k - left * gain, ok)
    tl.store(inverse + at, inv, ok)


@triton.jit(do_not_specialize=["low", "high", "N", "K", "S"])
def gradients(
    dots, rows, tables, mu, log_sigma, priors, dmu, dlog_sigma, dweight, dbias, low, high,
    N, K, C, S, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of mu and log sigma in rows of contexts, of weight and bias in row K.

    With D1 = sum dy and D2 = sum dy (x - mu_k) over the instances of a context, and A = weight /
    sigma_k: dmu = -A D1, dlog_sigma = -A D2; dweight = sum_k D2 / sigma_k, dbias = sum_k D1.
    """
    k, c, at, ok = parts.take_row(tl.program_id(0), C, BC)
    lying = parts.split(tables, K + 1, C)
    centre, scale, inverse = lying[0], lying[1], lying[3]
    first, second = dots, dots + N.to(tl.int64) * S * C
    order, offsets = rows + N, rows + 2 * N
    if k < K:
        lo, hi = parts.find_parts_of(offsets, k, S)
        one, two = parts.add_dots(first, second, order, lo, hi, c, C, S, BN)
        a = tl.load(scale + at, ok, 0.0)
        dm, dl = -a * one, -a * two
        lo, hi = parts.find_parts_of(offsets, K, S)
        if (lo < hi) & (low <= k) & (k < high):
            # Samples without a label have a share of every context that is pooled.
            share = tl.load(priors + k).to(tl.float32) / parts.add_priors(priors, low, high, BN)
            one, two = parts.add_dots(first, second, order, lo, hi, c, C, S, BN)
            pool = K.to(tl.int64) * C + c
            a, r = tl.load(scale + pool, ok, 0.0), tl.load(inverse + pool, ok, 0.0)
            by_var = -0.5 * a * r * r * two
            off = tl.load(mu + at, ok, 0.0).to(tl.float32) - tl.load(centre + pool, ok, 0.0)
            var = tl.exp(2 * tl.load(log_sigma + at, ok, 0.0).to(tl.float32))
            dm += share * (2 * off * by_var - a * one)
            dl += share * 2 * var * by_var
        tl.store(dmu + at, dm, ok)
        tl.store(dlog_sigma + at, dl, ok)
    elif dweight is not None:
        by_weight, by_bias = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for i in range(0, N * S, BN):
            lie, _, there = parts.find_parts(None, i, N * S, c, C, S, BN)
            n = (i + tl.arange(0, BN)) // S
            row = tl.load(rows + n, n < N, 0)[:, None] * C + c[None, :]
            one = tl.load(first + lie, there, 0.0)
            by_bias += tl.sum(one, 0)
            two = tl.load(second + lie, there, 0.0)
            by_weight += tl.sum(two * tl.load(inverse + row, there, 0.0), 0)
        tl.store(dweight + c, by_weight, ok)
        tl.store(dbias + c, by_bias, ok)


def norm_learned(
    x: Tensor, labels: Tensor | None, learned: Tensors, priors: Tensor, pooled: Any
) -> Tensor:
    """Return x normalised with what is learned of each instance's context.

    That are mu and log sigma, (K, C), weight and bias, (C,) or None. Labels and pooled contexts
    are as in `normswap.functional.triton.context_norm`.
    """
    contexts = len(learned[0])
    if not records((x, *(t for t in learned if t is not None))):
        found, apply = _make_tables(x, learned, priors, pooled, None, labels)
        y = torch.empty_like(x)
        apply(x, y, found, labels)
        return y
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    if labels.shape[0] != x.shape[0]:
        labels = labels.expand(x.shape[0])
    index = sort_labels(labels, contexts)
    return record(_OPERATOR, (priors, pooled, index), x, *learned)


@lru_cache(maxsize=4096)
def _forward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, ordered: bool,
    step: int | None,
) -> tuple[int, BoundLaunch, BoundLaunch]:  # fmt: skip
    """Return the size of all tables, and the launches for tensors of these kinds."""
    p = plan_of(shape, contiguous)
    instances, channels, _ = p.shape
    programs, blocks = cut_rows(contexts + (pooled is not None), channels)
    numbers = (*(pooled or (0, 0)), instances, contexts, channels)
    apply = sweeps.apply_rows(p, contexts + 1, contexts, step)
    size = 4 * (contexts + 1) * channels
    return size, BoundLaunch(tables, programs, numbers, **blocks), apply


@lru_cache(maxsize=4096)
def _backward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, affine: bool,
    needed: bool,
) -> tuple[int, BoundLaunch, BoundLaunch]:  # fmt: skip
    """Return the size of what is added up, and the launches for tensors of these kinds."""
    p = plan_of(shape, contiguous)
    instances, channels, _ = p.shape
    over_x = (None, None, contexts + 1, contexts, *p.geometry)
    programs, blocks = cut_rows(contexts + affine, channels)
    numbers = (*(pooled or (0, 0)), instances, contexts, channels, p.splits)
    dots = BoundLaunch(tile.dots, p.programs, over_x, **p.blocks)
    size = 2 * instances * p.splits * channels
    return size, dots, BoundLaunch(gradients, programs, numbers, **blocks)


def _make_tables(
    x: Tensor, learned: Tensors, priors: Tensor, pooled: Any, index: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, BoundLaunch]:  # fmt: skip
    """Return centre, scale, shift and 1 / sigma of contexts and the pool, (4, K + 1, C).

    The index is of sorted labels. The rest is the launch that applies the tables by rows.
    """
    kinds = [t for t in (x, *learned, priors, rows) if t is not None]
    what = (x.shape, x.is_contiguous(), len(learned[0]), pooled)
    how = (index is not None, sweeps.step_of(rows))
    size, start, apply = launches_for(kinds, _forward_of, *what, *how)
    found = x.new_empty(size, dtype=torch.float32)
    start(*learned, priors, index, found)
    return found, apply


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    (x, *learned), (priors, pooled, index) = inputs, given
    found, apply = _make_tables(x, learned, priors, pooled, index, index)
    y = torch.empty_like(x)
    apply(x, y, found, index)
    return y, priors, index, found


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    (x, *learned), (priors, index, lying), pooled = inputs, kept, given[1]
    mu, log_sigma, weight, _ = learned
    dy, dx = kernels.match(dy, x), torch.empty_like(x) if needed[0] else None
    kinds = [t for t in (x, dy, *learned, priors, index, lying) if t is not None]
    what = (x.shape, x.is_contiguous(), len(mu), pooled, weight is not None, needed[0])
    size, dots, start = launches_for(kinds, _backward_of, *what)
    found = x.new_empty(size, dtype=torch.float32)
    dots(dy, x, dx, found, lying, index)
    grads = [None if t is None else torch.empty_like(t) for t in learned]
    start(found, index, lying, mu, log_sigma, priors, *grads)
    return dx, *grads


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x, mu, log_sigma, weight, bias), (priors, index, _) = inputs, kept
    low, high = given[1] or (0, len(mu))
    mean, spread = mu.float(), log_sigma.float()
    share = priors[low:high].float() / priors[low:high].float().sum()
    pooled = pool_moments(Moments(mean[low:high], (2 * spread[low:high]).exp()), share)
    inverse = torch.cat((torch.exp(-spread), pooled.var.rsqrt()))
    scale = inverse if weight is None else weight.float() * inverse
    shift = torch.zeros_like(scale) if bias is None else bias.float().expand_as(scale)
    return apply_centred(x, Centred(torch.cat((mean, pooled.mean)), scale, shift), index[: len(x)])


_OPERATOR = Operator(_forward, _backward, _formula)
