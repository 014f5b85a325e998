"""The four passes over x that every stat-affine method is made of, without autograd.

All work on x (N, C, *) as it lies in memory, contiguous or channels_last, and on tables of shape
(N, C), or (1, C) for all instances. Nothing waits for a device.

On the CPU: torch's batch norm kernels on the view (1, N * C, positions) do a pass with a table
in one sweep; for channels_last, plain operators in blocks do. `torch.var_mean`, addcmul with a
broadcast inner dimension and reductions to one value per channel were several times slower. Other
devices are served by `normswap.functional.device_kernels`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from normswap.functional import device_kernels
from normswap.functional.backend import triton_for
from normswap.functional.device_kernels import dot_fused
from normswap.functional.moments import Moments, compute_dtype

# Values of a block: temporaries of it stay in a CPU's cache.
_BLOCK = 2**19
# Positions below which batch norm's kernel spends more on a channel's table than on its values.
_NARROW = 128
# Values of an instance from which one call for it costs less than blocks of several operators.
_LARGE = 2**16
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_reshape: Any = torch.ops.aten._unsafe_view
# In one sweep: (x - m)^2, and 2 dy (x - m).
_squares: Any = torch.ops.aten.mse_loss.out
_products: Any = torch.ops.aten.mse_loss_backward.grad_input

P = ParamSpec("P")
T = TypeVar("T")


def _by_device(function: Callable[P, T]) -> Callable[P, T]:
    """Have what `triton.sweeps`, or `device_kernels`, calls the same serve where it can.

    What they are given first says where; other tensors of its size are laid out alike. What is made
    of other passes serves any device.
    """

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> T:
        found: Any = args[0]
        module = triton_for(found)
        if module is None and found.device.type == "cpu":
            return function(*args, **kwargs)
        serving = getattr(module or device_kernels, function.__name__, function)
        result: T = serving(*args, **kwargs)
        return result

    return chosen


def suits(x: Tensor) -> bool:
    """Return whether x is laid out as the kernels read it, on a device that has them."""
    return (
        x.dim() > 2
        and x.numel() > 0
        and x.device.type in ("cpu", "cuda")
        and x.dtype in _DTYPES
        and (x.is_contiguous() or is_channels_last(x))
    )


def match(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy in the layout of x."""
    contiguous = x.is_contiguous() or x.dim() not in _FORMATS
    return dy.contiguous() if contiguous else dy.contiguous(memory_format=_FORMATS[x.dim()])


def is_channels_last(x: Tensor) -> bool:
    """Return whether x (N, C, *) is an image or a volume whose channels are last in memory."""
    return x.dim() in _FORMATS and x.is_contiguous(memory_format=_FORMATS[x.dim()])


def _is_narrow(x: Tensor) -> bool:
    """Return whether two sweeps of plain operators are faster than batch norm's one."""
    suits = x.is_contiguous() and x.dtype == compute_dtype(x)
    return suits and x.shape[2:].numel() < _NARROW


def _view(x: Tensor) -> Tensor:
    """Return x as (N * C, positions), or (N, positions, C) where channels are last."""
    if x.is_contiguous():
        return x.view(x.shape[0] * x.shape[1], -1)
    return x.movedim(1, -1).flatten(1, -2)


def _spread(table: Tensor, x: Tensor) -> Tensor:
    """Return a table (N, C) or (1, C) shaped to meet `_view(x)`."""
    if x.is_contiguous():
        whole = table if table.shape[0] == x.shape[0] else table.expand(x.shape[:2])
        return whole.reshape(-1, 1)
    return table.unsqueeze(1)


def _block_rows(view: Tensor) -> int:
    """Return how many rows a block has: of blocks alike, with no small one left over."""
    rows = view.shape[0]
    blocks = -(-view.numel() // _BLOCK)
    return -(-rows // blocks)


def _split(rows: int, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of so many rows of several tensors; slices would cost more than small sums."""
    if rows >= len(tensors[0]):
        return iter((tuple(tensors),))
    return zip(*(torch.split(t, rows) for t in tensors), strict=True)


@_by_device
def stats(x: Tensor) -> Moments:
    """Return mean and biased variance of each channel of each instance, (N, C).

    Three sweeps over a block: of differences to a value of the instance, of these to their mean,
    so that nothing cancels.
    """
    wide, view = compute_dtype(x), _view(x)
    positions = view.shape[1]
    mean = x.new_empty(x.shape[:2], dtype=wide)
    var = torch.empty_like(mean)
    rows = _block_rows(view)
    # Memory in use for every block is memory in the cache.
    scratch = view.new_empty(min(rows, len(view)), *view.shape[1:], dtype=wide)
    first = view[:, :1].to(wide, copy=True)
    for part, one, m, v in _split(rows, (view, first, _spread(mean, x), _spread(var, x))):
        off = torch.sub(part.to(wide), one, out=scratch[: len(part)])
        torch.sum(off, 1, keepdim=True, out=m).div_(positions)
        torch.sum(_squares(off, m, 0, out=off), 1, keepdim=True, out=v)
    return Moments(mean.add_(first.reshape(mean.shape)), var.div_(positions))


@_by_device
def affine(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return ``x * scale + offset`` in the dtype and layout of x; no offset is 0.

    The tables are in `compute_dtype(x)`.
    """
    whole = scale.shape[0] == 1
    if offset is not None and not whole and _is_narrow(x):
        y = torch.empty_like(x)
        # Not a product and a sum: addcmul rounds once, as far from zero as the offset may be.
        _view(y).copy_(_spread(offset, x)).addcmul_(_view(x), _spread(scale, x))
        return y
    if offset is not None and (whole or x.is_contiguous()):
        weight, bias = (t[0] if whole else t.reshape(-1) for t in (scale, offset))
        given = (x if whole else _view(x).unsqueeze(0), weight, bias)
        moments = (torch.zeros_like(weight), torch.ones_like(weight))
        # Not in training, momentum and eps 0, without cuDNN.
        y = torch.batch_norm(*given, *moments, False, 0.0, 0.0, False)
        # Not a view for autograd, which would refuse the in-place activation after it.
        return y if whole else _reshape(y, x.shape)
    y = torch.empty_like(x)
    shift = None if offset is None else _spread(offset, x)
    _multiply_add(_view(y), shift, _view(x), _spread(scale, x))
    return y


def _multiply_add(out: Tensor, offset: Tensor | None, *factors: Tensor) -> None:
    """Write to out ``offset + values * table + ...``, the factors, block by block."""
    wide = compute_dtype(out)
    same = out.dtype == wide
    given = factors if offset is None else (*factors, offset)
    once = same and len(factors) == 2
    rows = len(out) if once else _block_rows(out)
    tensors = [t.expand(len(out), *t.shape[1:]) for t in given]
    for target, values, table, *more in _split(rows, (out, *tensors)):
        place: Any = {"out": target} if same else {}
        if offset is None:
            total = torch.mul(values.to(wide), table, **place)
        else:
            total = torch.addcmul(more[-1], values.to(wide), table, **place)
        if len(factors) > 2:
            total.addcmul_(more[0].to(wide), more[1])
        if not same:
            target.copy_(total)


@_by_device
def dot(dy: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - centre)`` over positions, (N, C).

    Where the centre is (1, C), over instances too, (1, C).
    """
    if x.is_contiguous() or centre.shape[0] == 1:
        return dot_fused(dy, x, centre, None)[1:]
    if x.numel() // len(x) >= _LARGE:
        found = [dot_fused(g, v, m, None)[1:] for g, v, m in _split(1, (dy, x, centre))]
        first, second = (torch.cat(sums) for sums in zip(*found, strict=True))
        return first, second
    wide, view = compute_dtype(x), _view(x)
    first = x.new_empty(x.shape[:2], dtype=wide)
    second = torch.empty_like(first)
    rows = _block_rows(view)
    scratch = view.new_empty(min(rows, len(view)), *view.shape[1:], dtype=wide)
    tensors = (view, _view(dy), first, second, _spread(centre, x))
    for part, grad, one, two, m in _split(rows, tensors):
        grad, product = grad.to(wide), scratch[: len(part)]
        _products(grad, part.to(wide), m, 0, grad_input=product)
        torch.sum(product, 1, out=two)
        torch.sum(grad, 1, out=one)
    return first, second.mul_(0.5)


@_by_device
def scale_and_dot(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dy * scale`` and what `dot` returns."""
    if not (x.is_contiguous() or centre.shape[0] == 1):
        return affine(dy, scale, None), *dot(dy, x, centre)
    dx, first, second = dot_fused(dy, x, centre, scale)
    return dx.view(x.shape), first, second


@_by_device
def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, centre: Tensor) -> Tensor:
    """Return ``a * dy + b * (x - centre) + c``, tables (N, C), in the dtype and layout of x."""
    # x first: what is left once the large numbers have cancelled is small, and rounds as such.
    c = torch.addcmul(c, b, centre, value=-1)
    if x.is_contiguous() and x.dtype == compute_dtype(x):
        dx = affine(x, b, c)
        _view(dx).addcmul_(_view(dy), _spread(a, x))
        return dx
    dx = torch.empty_like(x)
    a, b, c = (_spread(t, x) for t in (a, b, c))
    _multiply_add(_view(dx), c, _view(x), b, _view(dy), a)
    return dx
