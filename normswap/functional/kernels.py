"""The four passes over x that every stat-affine method is made of, without autograd.

All work on x (N, C, *) as it lies in memory, contiguous or channels_last, and on tables of shape
(N, C), or (1, C) for all instances. Nothing waits for a device.

On the CPU, torch's batch norm kernels on the view (1, N * C, positions) do a pass with a table in
one sweep; for channels_last, plain operators in blocks do. `torch.var_mean`, addcmul with
a broadcast inner dimension and reductions to one value per channel were several times slower.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normswap.functional.moments import Moments, compute_dtype

# Values of a block: temporaries of it stay in a CPU's cache.
_BLOCK = 2**20
# Values of an instance from which one call for it costs less than blocks of several operators.
_LARGE = 2**15
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_grad_kernel: Any = torch.ops.aten.native_batch_norm_backward
_reshape: Any = torch.ops.aten._unsafe_view


def suits(x: Tensor) -> bool:
    """Return whether x is laid out as the kernels read it, on a device that has them."""
    return (
        x.dim() > 2
        and x.numel() > 0
        and x.device.type in ("cpu", "cuda")
        and x.dtype in _DTYPES
        and (x.is_contiguous() or _is_channels_last(x))
    )


def match(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy in the layout of x."""
    if x.is_contiguous():
        return dy.contiguous()
    return dy.contiguous(memory_format=_FORMATS[x.dim()])


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() in _FORMATS and x.is_contiguous(memory_format=_FORMATS[x.dim()])


def _fuses(x: Tensor) -> bool:
    """Return whether the batch norm kernels can take (instance, channel) for a channel."""
    return x.is_contiguous()


def _view(x: Tensor) -> Tensor:
    """Return x as (N * C, positions), or (N, positions, C) where channels are last."""
    if x.is_contiguous():
        return x.view(x.shape[0] * x.shape[1], -1)
    return x.movedim(1, -1).flatten(1, -2)


def _spread(table: Tensor, x: Tensor) -> Tensor:
    """Return a table (N, C) or (1, C) shaped to meet `_view(x)`."""
    if x.is_contiguous():
        return table.expand(x.shape[:2]).reshape(-1, 1)
    return table.unsqueeze(1)


def _blocks(view: Tensor) -> Iterator[slice]:
    rows = view.shape[0]
    step = max(_BLOCK * rows // view.numel(), 1) if view.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _part(table: Tensor, rows: slice) -> Tensor:
    return table if table.shape[0] == 1 else table[rows]


def _as_channels(t: Tensor) -> Tensor:
    return t.view(1, t.shape[0] * t.shape[1], -1)


def _flat(table: Tensor, x: Tensor) -> Tensor:
    return table.expand(x.shape[:2]).reshape(-1)


def stats(x: Tensor) -> Moments:
    """Return mean and biased variance of each channel of each instance, (N, C).

    Two sweeps over a block: the spread is of differences to the mean, so nothing cancels.
    """
    wide = compute_dtype(x)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x.to(wide), tuple(range(2, x.dim())), correction=0)
        return Moments(mean, var)
    view = _view(x)
    positions = view.shape[1]
    mean = x.new_empty(x.shape[:2], dtype=wide)
    var = torch.empty_like(mean)
    means, variances = (_spread(t, x) for t in (mean, var))
    for rows in _blocks(view):
        part = view[rows].to(wide)
        m = torch.sum(part, 1, keepdim=True, out=means[rows]).div_(positions)
        centred = part - m
        torch.sum(centred.mul_(centred), 1, keepdim=True, out=variances[rows]).div_(positions)
    return Moments(mean, var)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``(x - centre) * scale + shift`` in the dtype and layout of x.

    The tables are in `compute_dtype(x)`.
    """
    if scale.shape[0] == 1 or _fuses(x):
        whole = scale.shape[0] == 1
        weight, bias, mean = (t[0] if whole else _flat(t, x) for t in (scale, shift, centre))
        y = torch.batch_norm(
            x if whole else _as_channels(x),
            weight,
            bias,
            mean,
            torch.ones_like(mean),
            training=False,
            momentum=0.0,
            eps=0.0,
            cudnn_enabled=False,
        )
        # Not a view for autograd, which would refuse the in-place activation after it.
        return y if whole else _reshape(y, x.shape)
    y = torch.empty_like(x)
    view, out = _view(x), _view(y)
    offset = _spread(torch.addcmul(shift, centre, scale, value=-1), x)
    _multiply_add(out, [(view, _spread(scale, x))], offset)
    return y


def _multiply_add(out: Tensor, terms: list[tuple[Tensor, Tensor]], offset: Tensor | None) -> None:
    """Write ``sum term * table + offset`` to out, block by block."""
    wide = compute_dtype(out)
    same = out.dtype == wide
    for rows in _blocks(out):
        first, *others = [(t[rows], _part(table, rows)) for t, table in terms]
        target: Any = {"out": out[rows]} if same else {}
        if offset is None:
            total = torch.mul(first[0].to(wide), first[1], **target)
        else:
            total = torch.addcmul(_part(offset, rows), first[0].to(wide), first[1], **target)
        for values, table in others:
            total.addcmul_(values.to(wide), table)
        if not same:
            out[rows] = total


def dot(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - centre)`` over positions, (N, C).

    Where the centre is (1, C), over instances too, (1, C).
    """
    whole = centre.shape[0] == 1
    if whole or _fuses(x):
        mean = centre[0] if whole else _flat(centre, x)
        ones = torch.ones_like(mean)
        given = (dy, x) if whole else (_as_channels(dy), _as_channels(x))
        mask = [False, True, True]
        _, second, first = _grad_kernel(*given, ones, mean, ones, None, None, False, 0.0, mask)
        return first.view(centre.shape), second.view(centre.shape)
    first = x.new_empty(x.shape[:2], dtype=compute_dtype(x))
    second = torch.empty_like(first)
    if _is_large(x):
        ones = torch.ones_like(centre[0])
        for row in range(len(x)):
            part = slice(row, row + 1)
            tables = (ones, centre[row], ones, None, None)
            found = _grad_kernel(dy[part], x[part], *tables, False, 0.0, [False, True, True])
            _, by_x, by_one = found
            first[row], second[row] = by_one, by_x
        return first, second
    grads, values, middle = _view(dy), _view(x), _spread(centre, x)
    wide = first.dtype
    for rows in _blocks(values):
        grad = grads[rows].to(wide)
        torch.sum(grad, 1, out=first[rows])
        centred = values[rows].to(wide) - middle[rows]
        torch.sum(centred.mul_(grad), 1, out=second[rows])
    return first, second


def _is_large(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() // len(x) >= _LARGE


def scale_and_dot(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dy * scale`` and what `dot` returns."""
    whole = centre.shape[0] == 1
    if not (whole or _fuses(x)):
        return scaled(dy, scale), *dot(dy, x, centre)
    mean, weight = (t[0] if whole else _flat(t, x) for t in (centre, scale))
    ones = torch.ones_like(mean)
    given = (dy, x) if whole else (_as_channels(dy), _as_channels(x))
    mask = [True, True, True]
    dx, second, first = _grad_kernel(*given, weight, mean, ones, None, None, False, 0.0, mask)
    return dx if whole else dx.view(x.shape), first.view(centre.shape), second.view(centre.shape)


def scaled(dy: Tensor, scale: Tensor) -> Tensor:
    """Return ``dy * scale`` in the dtype and layout of dy."""
    dx = torch.empty_like(dy)
    _multiply_add(_view(dx), [(_view(dy), _spread(scale, dy))], None)
    return dx


def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * dy + b * x + c``, tables (N, C), in the dtype and layout of x."""
    if _fuses(x) and x.dtype == compute_dtype(x):
        dx = affine(dy, torch.zeros_like(a), a, c)
        _view(dx).addcmul_(_view(x), _spread(b, x))
        return dx
    dx = torch.empty_like(x)
    tables = [_spread(t, x) for t in (a, b, c)]
    _multiply_add(_view(dx), [(_view(dy), tables[0]), (_view(x), tables[1])], tables[2])
    return dx
