"""The passes that devices other than the CPU take, on CPU tensors: against float64."""

import pytest
import torch

from normswap.functional import device_kernels
from tests.support.builders import assert_close, make_batch
from tests.support.stat_maps import laid_out

DTYPES = pytest.mark.parametrize(
    ("dtype", "roundoff"),
    [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "last"])
FEW = 16


def inputs(dtype, layout, rows=5, mean=0.0):
    """Return x, dy and four tables (rows, 4) in float32."""
    generator = torch.Generator().manual_seed(1)
    tensors = [laid_out(make_batch((5, 4, 6, 7), seed).float(), layout) for seed in (0, 1)]
    tables = [torch.rand(rows, 4, generator=generator) + 0.5 for _ in range(4)]
    return (tensors[0] + mean).to(dtype), tensors[1].to(dtype), *tables


def wide(*tensors):
    """Return tensors in float64, tables with the dimensions of x."""
    return [t.double() if t.dim() == 4 else t.double()[:, :, None, None] for t in tensors]


@DTYPES
@LAYOUTS
def test_statistics_of_instances_are_float32s(dtype, roundoff, layout):
    x = inputs(dtype, layout, mean=30.0)[0]
    mean, var = device_kernels.stats(x)
    values = x.double().flatten(2)
    assert mean.dtype == var.dtype == torch.float32
    assert_close(mean, values.mean(2), FEW * 2**-24)
    assert_close(var, values.var(2, correction=0), FEW * 2**-24)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("rows", [1, 5])
def test_an_affine_rounds_once(dtype, roundoff, layout, rows):
    x, _, scale, offset, *_ = inputs(dtype, layout, rows)
    wx, ws, wo = wide(x, scale, offset)
    for found, expected in (
        (device_kernels.affine(x, scale, offset), wx * ws + wo),
        (device_kernels.affine(x, scale, None), wx * ws),
    ):
        assert found.dtype == dtype
        assert found.stride() == x.stride()
        assert_close(found, expected, roundoff)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_sums_of_a_gradient_are_float32s(dtype, roundoff, layout, rows, mean):
    x, dy, scale, centre, *_ = inputs(dtype, layout, rows, mean)
    centre = centre + mean
    wx, wy, ws, wc = wide(x, dy, scale, centre)
    dims = (2, 3) if rows == 5 else (0, 2, 3)
    expected = [t.sum(dims).view(rows, 4) for t in (wy, wy * (wx - wc))]
    sums = device_kernels.dot(dy, x, centre)
    for found, wanted in zip(sums, expected, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, wanted, FEW * (1 + mean) * 2**-24)
    if layout == "contiguous" or rows == 1:  # by the call that gives these sums, too
        dx, *same = device_kernels.dot_fused(dy, x, centre, scale)
        assert dx.dtype == dtype
        assert_close(dx.view(x.shape), wy * ws, roundoff)
        assert all(map(torch.equal, same, sums))


@DTYPES
@LAYOUTS
def test_a_gradient_rounds_once(dtype, roundoff, layout):
    x, dy, *tables = inputs(dtype, layout)
    dx = device_kernels.combine(dy, x, *tables)
    wx, wy, a, b, c, centre = wide(x, dy, *tables)
    assert dx.dtype == dtype
    assert dx.stride() == x.stride()
    assert_close(dx, a * wy + b * (wx - centre) + c, FEW * 2**-24 + roundoff)
