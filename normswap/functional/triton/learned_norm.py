"""CN-X by Triton: two launches forward, two backward.

Where samples without a label weigh the contexts, each for itself, three, of which one is for their
moments, and four: one for the weights' gradients, and one as the moments of x move with it.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.affine import Centred
from normswap.functional.moments import (
    Moments,
    context_posterior,
    instance_moments,
    pool_moments,
)
from normswap.functional.tables import apply_centred, records
from normswap.functional.triton import learned_kernels, sweeps, tile
from normswap.functional.triton.launching import BoundLaunch, launches_for
from normswap.functional.triton.plan import cut_contexts, cut_rows, cut_tables, plan_of
from normswap.functional.triton.recording import Operator, Tensors, record
from normswap.functional.triton.sorting import expand_labels, find_rows, sort_labels


class Forward(NamedTuple):
    """The launches of a forward, tensors not given yet, and the sizes of what they write."""

    values: int
    parts: tuple[int, ...]
    stats: BoundLaunch
    tables: BoundLaunch
    apply: BoundLaunch


class Backward(NamedTuple):
    """The launches of a backward, likewise."""

    values: int
    dots: BoundLaunch
    weights: BoundLaunch
    gradients: BoundLaunch
    combine: BoundLaunch


def norm_learned(
    x: Tensor, labels: Tensor | None, learned: Tensors, priors: Tensor, pooled: Any, weighs: bool
) -> Tensor:
    """Return x normalised with what is learned of each instance's context.

    That are mu and log sigma, (K, C), weight and bias, (C,) or None. Labels, pooled contexts and
    whether samples without a label weigh them are as in `normswap.functional.triton.context_norm`.
    """
    contexts = len(learned[0])
    if not records((x, *(t for t in learned if t is not None))):
        index = None
        if weighs and labels is not None:
            index = labels = find_rows(labels.expand(len(x)), contexts)
        apply, found, _ = _make_tables(x, learned, priors, pooled, weighs, index, labels)
        y = torch.empty_like(x)
        apply(x, y, found, labels)
        return y
    index = sort_labels(expand_labels(labels, x), contexts, weighs)
    return record(_OPERATOR, (priors, pooled, weighs, index), x, *learned)


@lru_cache(maxsize=4096)
def _forward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, weighs: bool,
    ordered: bool, step: int | None,
) -> Forward:  # fmt: skip
    """Return the launches for tensors of these kinds; see `cn_launches.forward_of`."""
    p = plan_of(shape, contiguous)
    cut = cut_tables(p, contexts, pooled is not None, weighs)
    instances, rows, _, channels, *_ = cut.numbers
    numbers = (*(pooled or (0, 0)), *cut.numbers)
    return Forward(
        4 * rows * channels + weighs * instances * contexts,
        (2, instances, p.splits, channels),
        BoundLaunch(tile.stats, p.programs, (1, contexts, *p.geometry), **p.blocks),
        BoundLaunch(learned_kernels.tables, cut.programs, numbers, **cut.blocks),
        sweeps.apply_rows(p, rows, contexts, step),
    )


@lru_cache(maxsize=4096)
def _backward_of(
    kinds: Any, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any, weighs: bool,
    affine: bool, needed: bool,
) -> Backward:  # fmt: skip
    """Return the launches for tensors of these kinds; `needed` says whether there is a dx."""
    p = plan_of(shape, contiguous)
    cut = cut_tables(p, contexts, affine, weighs)
    instances, rows, _, channels, *_ = cut.numbers
    programs, blocks = cut_rows(contexts + affine, channels)
    numbers = (*(pooled or (0, 0)), *cut.numbers)
    values = 2 * rows * channels + instances * contexts if weighs else 0
    weights, every = learned_kernels.weight_gradients, cut_contexts(contexts, channels)
    return Backward(
        2 * instances * p.splits * channels + values,
        BoundLaunch(tile.dots, p.programs, cut.rows, **p.blocks),
        BoundLaunch(weights, instances, cut.numbers[:-1], **every),
        BoundLaunch(learned_kernels.gradients, programs, numbers, **blocks),
        BoundLaunch(tile.combine, p.programs, cut.rows, **p.blocks),
    )


def _make_tables(
    x: Tensor, learned: Tensors, priors: Tensor, pooled: Any, weighs: bool, index: Tensor | None,
    rows: Tensor | None,
) -> tuple[BoundLaunch, Tensor, Tensor | None]:  # fmt: skip
    """Return the launch that applies tables by rows, those, and moments of parts, if some weigh.

    Tables are centre, scale, shift and 1 / sigma of contexts, and of the pool or of instances, and
    the weights of these. The index is of sorted labels, or, where some weigh, may be of rows alone.
    """
    kinds = [t for t in (x, *learned, priors, rows) if t is not None]
    what = (x.shape, x.is_contiguous(), len(learned[0]), pooled, weighs)
    found = launches_for(kinds, _forward_of, *what, index is not None, sweeps.step_of(rows))
    parts = None
    if weighs:
        parts = x.new_empty(found.parts, dtype=torch.float32)
        found.stats(x, parts, index)
    tables = x.new_empty(found.values, dtype=torch.float32)
    found.tables(*learned, priors, parts, index, tables)
    return found.apply, tables, parts


def _forward(inputs: Tensors, given: Any) -> tuple[Any, ...]:
    (x, *learned), (priors, pooled, weighs, index) = inputs, given
    apply, *found = _make_tables(x, learned, priors, pooled, weighs, index, index)
    y = torch.empty_like(x)
    apply(x, y, found[0], index)
    return y, priors, index, *found


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    (x, *learned), (priors, index, lying, parts) = inputs, kept
    (mu, log_sigma, weight, _), (_, pooled, weighs, _) = learned, given
    dy, dx = kernels.match(dy, x), torch.empty_like(x) if needed[0] else None
    kinds = [t for t in (x, dy, *learned, priors, index, lying) if t is not None]
    what = (x.shape, x.is_contiguous(), len(mu), pooled, weighs, weight is not None, needed[0])
    start = launches_for(kinds, _backward_of, *what)
    found = x.new_empty(start.values, dtype=torch.float32)
    start.dots(dy, x, None if weighs else dx, found, lying, index)
    if weighs:
        start.weights(found, index, lying, mu, log_sigma, weight)
    grads = [None if t is None else torch.empty_like(t) for t in learned]
    start.gradients(found, index, lying, parts, mu, log_sigma, priors, *grads)
    if weighs and needed[0]:
        start.combine(dy, x, dx, found, None, lying, index)
    return dx, *grads


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    (x, mu, log_sigma, weight, bias), (priors, index, *_), weighs = inputs, kept, given[2]
    contexts, rows = len(mu), index[: len(x)]
    low, high = given[1] or (0, contexts)
    mean, spread = mu.float(), log_sigma.float()
    moments = Moments(mean, (2 * spread).exp())
    share = priors[low:high].float() / priors[low:high].float().sum()
    pooled = pool_moments(Moments(*(t[low:high] for t in moments)), share)
    inverse = torch.cat((torch.exp(-spread), pooled.var.rsqrt()))
    scale = inverse if weight is None else weight.float() * inverse
    shift = torch.zeros_like(scale) if bias is None else bias.float().expand_as(scale)
    table = Centred(torch.cat((mean, pooled.mean)), scale, shift)
    if not weighs:
        return apply_centred(x, table, rows)
    weights = context_posterior(instance_moments(x), moments, share, 0.0)
    mixed = Centred(*(t[:contexts] for t in table)).mix(weights)
    return apply_centred(x, table.rows(rows.clamp(max=contexts)).where(rows < contexts, mixed))


_OPERATOR = Operator(_forward, _backward, _formula)
