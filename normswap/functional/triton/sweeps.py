"""The passes over x of `normswap.functional.kernels`, by the kernels of `tile`.

Tables are float32, (N, C), or (1, C) for all instances, or (K, C) with the label of each instance,
(N,) or (1,), -1 the last row.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.functional.moments import Moments
from normswap.functional.triton import parts, tile
from normswap.functional.triton.launching import BoundLaunch, launch
from normswap.functional.triton.plan import Plan, cut_rows, plan


def part_stats(x: Tensor, index: Tensor | None = None, least: int = 0) -> Tensor:
    """Return mean and biased variance of parts of the positions, (2, N, S, C), S as in `plan`.

    With an index, (N,), only instances whose index is no less than `least` have any.
    """
    p = plan(x)
    found = x.new_empty(2, x.shape[0], p.splits, x.shape[1], dtype=torch.float32)
    numbers = (_step(index), least, *p.geometry)
    launch(tile.stats, p.programs, x, found, index, numbers, **p.blocks)
    return found


def stats(x: Tensor) -> Moments:
    """Return mean and biased variance of each channel of each instance, (N, C)."""
    p, found = plan(x), part_stats(x)
    if p.splits == 1:
        return Moments(*found.squeeze(2).unbind())
    instances, channels, positions = p.shape
    programs, blocks = cut_rows(instances, channels)
    mean, var = x.new_empty(2, instances, channels, dtype=torch.float32).unbind()
    sizes = (channels, positions, p.splits, p.part)
    launch(parts.merge, programs, found, mean, var, *sizes, **blocks)
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
    (m, s, t), last, stride = _address(p, index, centre, scale, shift)
    numbers = (_step(index), None, last, stride, *p.geometry)
    launch(tile.apply, p.programs, x, y, m, index, s, t, numbers, **p.blocks)
    return y


def apply_rows(p: Plan, size: int, contexts: int, step: int | None) -> BoundLaunch:
    """Return the launch that does what `affine` does, by tables (size, C) that lie in one tensor.

    It takes x, y, the tables, and the row of each instance, (N,), or of all, (1,), -1 row K: see
    `step_of`. Without rows, all have that one, or, with K + N of them, instance n has row K + n.
    """
    channels = p.shape[1]
    stride = 0 if step is None and size == contexts + 1 else channels
    numbers = (None, None, step or 0, size, contexts, stride, *p.geometry)
    return BoundLaunch(tile.apply, p.programs, numbers, **p.blocks)


def step_of(rows: Tensor | None) -> int | None:
    """Return how far apart the rows of instances lie, 0 where all have one, None without rows."""
    return None if rows is None else _step(rows)


def part_dots(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Return ``dy * scale``, if there is a scale, and sums of dy and ``dy * (x - centre)``.

    The sums are over parts of the positions, (2, N, S, C); dy is laid out as x.
    """
    p, dx = plan(x), None if scale is None else torch.empty_like(x)
    found = x.new_empty(2, x.shape[0], p.splits, x.shape[1], dtype=torch.float32)
    (m, s), last, stride = _address(p, None, centre, scale)
    numbers = (stride, None, last, *p.geometry)
    launch(tile.dots, p.programs, dy, x, dx, found, m, None, s, numbers, **p.blocks)
    return dx, found


def dot(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - centre)``, of the shape of centre."""
    return scale_and_dot(dy, x, centre, None)[1:]


def scale_and_dot(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor | None
) -> tuple[Any, Tensor, Tensor]:
    """Return ``dy * scale``, if there is a scale, and what `dot` returns."""
    dx, found = part_dots(dy, x, centre, scale)
    if found.shape[1:3] != (len(centre), 1):
        # Over parts, and over instances where the tables have one row.
        found = found.sum((1, 2) if len(centre) == 1 else 2)
    first, second = found.view(2, *centre.shape).unbind()
    return dx, first, second


def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, centre: Tensor) -> Tensor:
    """Return ``a * dy + b * (x - centre) + c`` in the dtype and layout of x."""
    p, dx = plan(x), torch.empty_like(x)
    (s, t, u, m), last, stride = _address(p, None, a, b, c, centre)
    numbers = (stride, None, last, *p.geometry)
    launch(tile.combine, p.programs, dy, x, dx, t, u, m, None, s, numbers, **p.blocks)
    return dx


def _step(index: Tensor | None) -> int:
    """Return how far apart the rows of instances lie; 0 where all have the same."""
    return 0 if index is None or index.shape[0] == 1 else index.stride(0)


def _address(p: Plan, index: Tensor | None, *tables: Tensor | None) -> tuple[Any, int, int]:
    """Return the tables as the kernels read them, their last row, and the stride between rows."""
    count, (instances, channels, _) = max([t.shape[0] for t in tables if t is not None]), p.shape
    if index is None and count not in (1, instances):
        raise ValueError(f"expected tables of 1 or {instances} rows, got {count}")
    shape = (count, channels)
    found = [
        t if t is None or (t.shape == shape and t.is_contiguous()) else t.expand(shape).contiguous()
        for t in tables
    ]
    return found, 0 if index is None else count - 1, 0 if count == 1 else channels
