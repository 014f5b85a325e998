"""What CN and CN-X launch: passes over x, and, between them, kernels over tables of contexts.

The tables of a forward lie in one tensor: centre, scale and shift, of K contexts and of what
samples without a label take, one row, or, where these weigh the contexts, one each; then what else
backward needs. Launches for inputs of a size and tensors of some kinds are found once, and kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.functional import kernels as passes
from normswap.functional.tables import records
from normswap.functional.triton import tile
from normswap.functional.triton.launching import BoundLaunch, launches_for
from normswap.functional.triton.plan import Plan, cut_contexts, cut_rows, plan_of
from normswap.functional.triton.recording import Operator, Tensors, record
from normswap.functional.triton.sorting import find_rows, sort_labels
from normswap.functional.triton.sweeps import apply_rows, step_of


@dataclass(frozen=True, eq=False)
class Kernels:
    """A method's kernels over tables.

    Attributes:
        values: how many values all tables have, of N, R, K, C and whether samples weigh the
            contexts; R is the number of rows of centre, scale and shift.
        tables, gradients: write tables, and the gradients of what is learned.
        formula: as that of an `Operator`, given a norm and the index of sorted labels.
        weights: runs before gradients where samples weigh the contexts by what is learned.
        move: applies tables and moves running statistics.
    """

    values: Callable[[int, int, int, int, bool], int]
    tables: Any
    gradients: Any
    formula: Callable[..., Tensor]
    weights: Any = None
    move: Any = None


class Norm(NamedTuple):
    """What a layer computes with.

    Attributes:
        kernels: of its method.
        learned: weight and bias, (K, C), of CN; mu and log sigma, (K, C), weight and bias, (C,) or
            None, of CN-X.
        priors: (K,).
        pooled: which contexts, from and to, are pooled for samples without a label; (0, 0) where
            there must be none, None where the host knows that there is none.
        weighs: whether samples without a label, instead, weigh the contexts, each for itself.
        batched: whether contexts with two values or more in the batch have the moments of these.
        running: mean and variance, (K, C), of the others, and how many batches moved them, (K,).
        moved: those of them that this batch is to move, or nothing.
        rates: eps, added to the variance, and momentum, None for the average of all batches.
        note: called with x, all tables, and this.
    """

    kernels: Kernels
    learned: Tensors
    priors: Tensor
    pooled: tuple[int, int] | None
    weighs: bool
    batched: bool = False
    running: Tensors = ()
    moved: Tensors = ()
    rates: tuple[float | None, ...] = ()
    note: Callable[..., None] | None = None


def normalize(x: Tensor, labels: Tensor | None, norm: Norm) -> Tensor:
    """Return x normalised; labels are (N,) in [-1, K), or (1,), that of all, or None, all -1."""
    contexts, index = len(norm.priors), None
    if not norm.batched and not records((x, *_present(norm.learned))):
        if norm.weighs and labels is not None:
            index = labels = find_rows(labels.expand(len(x)), contexts)
        found, tables = _make_tables(x, norm, index, False, labels)
        y = torch.empty_like(x)
        found.apply(x, y, tables, labels)
        return y
    if labels is None:
        labels = torch.full((1,), -1, device=x.device)
    if labels.shape[0] != x.shape[0]:
        labels = labels.expand(x.shape[0])
    index = sort_labels(labels, contexts, norm.weighs)
    return record(_OPERATOR, (norm, index), x, *norm.learned)


def cut_tables(
    p: Plan, contexts: int, more: bool, weighs: bool
) -> tuple[tuple[int, ...], tuple[Any, ...], int, dict[str, int]]:
    """Return how programs share tables: numbers, those of kernels over x, programs and constants.

    That is what kernels take as N, R, K, C, M, S and PART; as scale, stride, R, K and geometry.
    There are programs for K rows, for one more, and for N instances that weigh the contexts.
    """
    instances, channels, positions = p.shape
    programs, blocks = cut_rows(contexts + more, channels)
    rows = contexts + (instances if weighs else 1)
    numbers = (instances, rows, contexts, channels, positions, p.splits, p.part)
    blocks |= cut_contexts(contexts, channels) if weighs else {"KP": 0, "WN": 1, "WC": 1}
    over_x = (None, None, rows, contexts, *p.geometry)
    return numbers, over_x, programs + weighs * instances, blocks


class Forward(NamedTuple):
    """The launches of a forward, tensors not given yet, and the sizes of what they write."""

    values: int
    parts: tuple[int, ...]
    stats: BoundLaunch | None
    tables: BoundLaunch
    apply: BoundLaunch


class Backward(NamedTuple):
    """The launches of a backward, likewise: dx is for the last one, or else for the first."""

    values: int
    dots: BoundLaunch
    weights: BoundLaunch | None
    gradients: BoundLaunch
    combine: BoundLaunch | None


@lru_cache(maxsize=4096)
def forward_of(
    kinds: Any, kernels: Kernels, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any,
    weighs: bool, batched: bool, rates: Any, ordered: bool | None, moves: bool, step: int | None,
) -> Forward:  # fmt: skip
    """Return the launches for tensors of these kinds.

    `ordered` says whether the index is of sorted labels, None that there is none; the step is that
    of the rows over x.
    """
    p, stats = plan_of(shape, contiguous), None
    numbers, over_x, programs, blocks = cut_tables(p, contexts, pooled is not None, weighs)
    instances, rows, _, channels, *_ = numbers
    if batched or weighs:
        # Of those without a label alone, where the moments of the others do not matter.
        some = (0, 0) if batched else (1, contexts)
        stats = BoundLaunch(tile.stats, p.programs, (*some, *p.geometry), **p.blocks)
    apply = apply_rows(p, rows, contexts, step)
    if moves:
        apply = BoundLaunch(kernels.move, p.programs, over_x[2:], **p.blocks)
    if kernels.move is not None:
        blocks |= {"BATCH": batched, "SORTED": ordered is True}
    numbers = (*(pooled or (0, 0)), *rates, *numbers)
    values = kernels.values(instances, rows, contexts, channels, weighs)
    tables = BoundLaunch(kernels.tables, programs, numbers, **blocks)
    return Forward(values, (2, instances, p.splits, channels), stats, tables, apply)


@lru_cache(maxsize=4096)
def backward_of(
    kinds: Any, kernels: Kernels, shape: torch.Size, contiguous: bool, contexts: int, pooled: Any,
    weighs: bool, batched: bool, rates: Any, more: bool, needed: bool,
) -> Backward:  # fmt: skip
    """Return the launches for tensors of these kinds; `needed` says whether there is a dx."""
    p, moves, weights = plan_of(shape, contiguous), needed and (batched or weighs), None
    numbers, over_x, programs, blocks = cut_tables(p, contexts, more, weighs)
    instances, rows, _, channels, *_ = numbers = numbers[:-1]
    values = 2 * channels * (instances * p.splits + (rows if moves or weighs else 0))
    if kernels.weights is not None:
        programs, blocks = cut_rows(contexts + more, channels)
        if weighs:
            every = cut_contexts(contexts, channels)
            weights = BoundLaunch(kernels.weights, instances, numbers, **every)
            values += instances * contexts
    numbers = (*(pooled or (0, 0)), *rates[:1], *numbers)
    how = {"MOVES": moves, "WEIGHED": weighs, **blocks}
    gradients = BoundLaunch(kernels.gradients, programs, numbers, **how)
    dots = BoundLaunch(tile.dots, p.programs, over_x, **p.blocks)
    combine = BoundLaunch(tile.combine, p.programs, over_x, **p.blocks) if moves else None
    return Backward(values, dots, weights, gradients, combine)


def _make_tables(
    x: Tensor, norm: Norm, index: Tensor | None, ordered: bool, rows: Tensor | None
) -> tuple[Forward, Tensor]:
    """Return what to launch, and all tables; the index is as for `forward_of`.

    Rows are what the last launch is given, (N,) or (1,) or None; see `step_of`.
    """
    given = (*norm.running, *norm.learned, norm.priors)
    kinds = (x, *norm.running, *_present(norm.learned), norm.priors, *norm.moved)
    kinds = kinds if rows is None else (*kinds, rows)
    how = (None if index is None else ordered, len(norm.moved) > 0, step_of(rows))
    found = launches_for(kinds, forward_of, *_settings(x, norm), *how)
    parts = None
    if found.stats is not None:
        parts = x.new_empty(found.parts, dtype=torch.float32)
        found.stats(x, parts, None if norm.batched else index)
    tables = x.new_empty(found.values, dtype=torch.float32)
    found.tables(*given, parts, index, tables)
    return found, tables


def _present(learned: Tensors) -> Tensors:
    """Return what there is of what is learned: there may be no affine."""
    return learned if learned[-1] is not None else learned[:-2]


def _settings(x: Tensor, norm: Norm) -> tuple[Any, ...]:
    how = (norm.pooled, norm.weighs, norm.batched, norm.rates)
    return norm.kernels, x.shape, x.is_contiguous(), len(norm.priors), *how


def _forward(inputs: Tensors, given: Any) -> tuple[Tensor, ...]:
    x, (norm, index) = inputs[0], given
    found, tables = _make_tables(x, norm, index, True, index)
    if norm.note is not None:
        norm.note(x, tables, norm)
    y = torch.empty_like(x)
    found.apply(x, y, tables, index, *norm.moved)
    return y, norm.priors, index, tables


def _backward(dy: Tensor, inputs: Tensors, kept: Tensors, given: Any, needed: Any) -> Tensors:
    (x, *learned), (priors, index, tables), norm = inputs, kept, given[0]
    dy, dx = passes.match(dy, x), torch.empty_like(x) if needed[0] else None
    kinds = (x, dy, *_present(learned), priors, index, tables)
    # A weight that contexts share has the gradients of a row more; else the pool has it.
    more = norm.pooled is not None if norm.kernels.weights is None else learned[-1] is not None
    start = launches_for(kinds, backward_of, *_settings(x, norm), more, needed[0])
    found = x.new_empty(start.values, dtype=torch.float32)
    start.dots(dy, x, None if start.combine else dx, found, tables, index)
    if start.weights is not None:
        start.weights(found, index, tables, *learned, priors)
    grads = [None if t is None else torch.empty_like(t) for t in learned]
    start.gradients(found, index, tables, *learned, priors, *grads)
    if start.combine is not None:
        start.combine(dy, x, dx, found, None, tables, index)
    return dx, *grads


def _formula(inputs: Tensors, kept: Tensors, given: Any) -> Tensor:
    y: Tensor = given[0].kernels.formula(inputs, kept, given)
    return y


_OPERATOR = Operator(_forward, _backward, _formula)
