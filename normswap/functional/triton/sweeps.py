"""The passes over x of `normswap.functional.kernels`, by the kernels of `tile`.

Tables are float32, (N, C), or (1, C) for all instances, or (K, C) with the label of each instance,
(N,) or (1,), -1 the last row.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.functional.moments import Moments
from normswap.functional.triton import parts, rows_kernels, tile
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import Plan, Rows, plan


def part_stats(x: Tensor, index: Tensor | None = None, least: int = 0) -> Tensor:
    """Return mean and biased variance of parts of the positions, (2, N, S, C), S as in `plan`.

    With an index, (N,), only instances whose index is no less than `least` have any.
    """
    p = plan(x)
    found = _room(x, p.splits)
    step = 0 if index is None else index.stride(0)
    launch(tile.stats, p.programs, x, found, index, (step, least, *p.geometry), **p.blocks)
    return found


def stats(x: Tensor) -> Moments:
    """Return mean and biased variance of each channel of each instance, (N, C)."""
    p, found = plan(x), part_stats(x)
    if p.splits == 1:
        return Moments(*found.squeeze(2).unbind())
    (instances, channels, positions), cut = p.shape, Rows(len(x), x.shape[1])
    mean, var = x.new_empty(2, instances, channels, dtype=torch.float32).unbind()
    sizes = (channels, positions, p.splits, p.part)
    launch(parts.merge, cut.programs, found, mean, var, *sizes, **cut.blocks)
    return Moments(mean, var)


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    centre: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Return ``(x - centre) * scale + shift``, in the dtype and layout of x; None is 0."""
    p, y = plan(x), torch.empty_like(x)
    tables, numbers = _address(p, index, centre, scale, shift)
    step = 0 if index is None or index.shape[0] == 1 else index.stride(0)
    launch(tile.apply, p.programs, x, y, *tables, index, (step, *numbers), **p.blocks)
    return y


def affine_of(x: Tensor, tables: Tensor, labels: Tensor | None, size: int, contexts: int) -> Tensor:
    """Return what `affine` does, by tables that lie in one tensor; see `rows_kernels`.

    Args:
        x: (N, C, *).
        tables: centre, scale and shift, (R, C) each, come first.
        labels: the row of each instance, (N,); or (1,), that of all; -1 is row K. None where all
            have that, or, with K + N rows, instance n has row K + n.
        size: R.
        contexts: K.
    """
    p, y = plan(x), torch.empty_like(x)
    stride = 0 if labels is None and size == contexts + 1 else x.shape[1]
    step = 0 if labels is None or labels.shape[0] == 1 else labels.stride(0)
    numbers = (step, size, contexts, stride, *p.geometry)
    launch(rows_kernels.apply, p.programs, x, y, tables, labels, numbers, **p.blocks)
    return y


def part_dots(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Return ``dy * scale``, if there is a scale, and sums of dy and ``dy * (x - centre)``.

    The sums are over parts of the positions, (2, N, S, C); dy is laid out as x.
    """
    p, dx = plan(x), None if scale is None else torch.empty_like(x)
    found = _room(x, p.splits)
    tables, numbers = _address(p, None, centre, scale)
    launch(tile.dots, p.programs, dy, x, dx, found, *tables, None, numbers, **p.blocks)
    return dx, found


def dot(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - centre)``, of the shape of centre."""
    return _whole(centre, part_dots(dy, x, centre)[1])


def scale_and_dot(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dy * scale`` and what `dot` returns."""
    dx, found = part_dots(dy, x, centre, scale)
    assert dx is not None
    return dx, *_whole(centre, found)


def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, centre: Tensor) -> Tensor:
    """Return ``a * dy + b * (x - centre) + c`` in the dtype and layout of x."""
    p, dx = plan(x), torch.empty_like(x)
    tables, numbers = _address(p, None, a, b, c, centre)
    launch(tile.combine, p.programs, dy, x, dx, *tables, None, numbers, **p.blocks)
    return dx


def _room(x: Tensor, splits: int) -> Tensor:
    """Return two tables of the parts, (2, N, S, C)."""
    return x.new_empty(2, x.shape[0], splits, x.shape[1], dtype=torch.float32)


def _address(p: Plan, index: Tensor | None, *tables: Tensor | None) -> tuple[Any, Any]:
    """Return the tables as the kernels read them; and K, stride and geometry to go with them."""
    count, (instances, channels, _) = max([t.shape[0] for t in tables if t is not None]), p.shape
    if index is None and count not in (1, instances):
        raise ValueError(f"expected tables of 1 or {instances} rows, got {count}")
    shape = (count, channels)
    found = [t if t is None or _lies_as(t, shape) else t.expand(shape).contiguous() for t in tables]
    last, stride = 0 if index is None else count - 1, 0 if count == 1 else channels
    return found, (last, stride, *p.geometry)


def _lies_as(t: Tensor, shape: tuple[int, int]) -> bool:
    return t.shape == shape and t.is_contiguous()


def _whole(centre: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over parts, and over instances where the tables have one row."""
    if found.shape[1:3] != (len(centre), 1):
        found = found.sum((1, 2) if len(centre) == 1 else 2)
    first, second = found.view(2, *centre.shape).unbind()
    return first, second
