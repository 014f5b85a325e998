"""The passes of `normswap.functional.kernels` on devices other than the CPU, by torch's operators.

What counts there are launches and bytes. An operator reads half precision beside float32 tables,
computes in float32 and writes either, so that no input is copied to be widened first.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.functional.moments import Moments, compute_dtype

_grad_kernel: Any = torch.ops.aten.native_batch_norm_backward
_products: Any = torch.ops.aten.mse_loss_backward.grad_input


def _spread(table: Tensor, x: Tensor) -> Tensor:
    """Return a table (N, C) or (1, C) shaped to meet x."""
    return table.view(*table.shape, *(1,) * (x.dim() - 2))


def stats(x: Tensor) -> Moments:
    """Return mean and biased variance of each channel of each instance, (N, C)."""
    wide, positions = compute_dtype(x), tuple(range(2, x.dim()))
    if x.dtype == wide:
        var, mean = torch.var_mean(x, positions, correction=0)
        return Moments(mean, var)
    # `var_mean` would round both to the dtype of x; these two read x and accumulate wide.
    mean = torch.mean(x, positions, dtype=wide)
    return Moments(mean, torch.var(x, positions, correction=0, out=torch.empty_like(mean)))


def affine(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return ``x * scale + offset`` in the dtype and layout of x; no offset is 0."""
    y, scale = torch.empty_like(x), _spread(scale, x)
    if offset is None:
        return torch.mul(x, scale, out=y)
    return torch.addcmul(_spread(offset, x), x, scale, out=y)


def dot(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - centre)``, of the shape of centre."""
    # Batch norm's kernel takes (instance, channel), or channels, for a channel.
    if x.is_contiguous() or centre.shape[0] == 1:
        return dot_fused(dy, x, centre, None)[1:]
    wide, positions = compute_dtype(x), tuple(range(2, x.dim()))
    first = torch.sum(dy, positions, dtype=wide)
    room = torch.empty_like(x, dtype=wide)
    if x.dtype == wide:
        _products(dy, x, _spread(centre, x).expand_as(x), 0, grad_input=room)
        return first, torch.sum(room, positions).mul_(0.5)
    # Centred after the sum: half precision has rounded x more than a float32 sum of it does, and
    # products of its values are exact.
    zero = first.new_zeros(()).expand(x.shape)
    second = torch.sum(torch.addcmul(zero, dy, x, out=room), positions)
    return first, second.addcmul_(centre, first, value=-1)


def dot_fused(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dy * scale``, if there is a scale, and what `dot` returns, by one call."""
    shape, mean = centre.shape, centre.reshape(-1)
    ones = torch.ones_like(mean)
    weight = ones if scale is None else scale.reshape(-1)
    given = (dy, x) if shape[0] == 1 else (t.view(1, len(mean), -1) for t in (dy, x))
    mask = [scale is not None, True, True]
    # CUDA's kernel takes the moments as saved, the CPU's as running ones.
    dx, second, first = _grad_kernel(*given, weight, mean, ones, mean, ones, False, 0.0, mask)
    return dx, first.view(shape), second.view(shape)


def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, centre: Tensor) -> Tensor:
    """Return ``a * dy + b * (x - centre) + c``, tables (N, C), in the dtype and layout of x."""
    c = torch.addcmul(c, b, centre, value=-1)
    a, b, c = (_spread(t, x) for t in (a, b, c))
    total = torch.addcmul(c, x, b, out=torch.empty_like(x, dtype=compute_dtype(x)))
    return torch.addcmul(total, dy, a, out=total if total.dtype == x.dtype else torch.empty_like(x))
