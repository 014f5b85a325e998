"""What the kernels compute, run by Triton's interpreter on a CPU; see `test_values`."""

import itertools

import pytest
import torch

from normswap.functional import backend, kernels
from normswap.functional.triton import sweeps, tile
from tests.support import oracles
from tests.support.builders import assert_close, make_batch, make_cn, make_cnx, running_of
from tests.support.fused import laid_out

# Half an ulp or, as the interpreter cuts off what bfloat16 doesn't hold, one.
ULP = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = pytest.mark.parametrize("dtype", ULP)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
LABELS = [2, 0, -1, 0, 3, -1, 2]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(backend, "DEVICES", ("cpu",))


def make(layer, dtype, shape, layout, offset=3.0):
    """Return x and dy, and the same and the layer's parameters in float64, to differentiate."""
    x = laid_out(make_batch(shape, 0, offset, dtype), layout).requires_grad_()
    dy = laid_out(make_batch(shape, 1, 0.0, dtype), layout)
    wide = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    return x, dy, wide


def compare(layer, x, dy, wide, labels, expected):
    """Hold output and gradients of a layer to those in float64."""
    y = layer(x, torch.tensor(labels))
    assert y.stride() == x.stride()
    share = ULP[x.dtype]
    assert_close(y, expected, share)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, (x, *parameters), dy)
    assert found[0].stride() == x.stride()
    wanted = torch.autograd.grad(expected, wide, dy.double(), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, torch.zeros_like(a, dtype=torch.float64) if b is None else b, share)


@LAYOUTS
@DTYPES
def test_cn_in_training(dtype, layout):
    layer = make_cn(6, 5, dtype=torch.float32, priors=[0.4, 0.1, 0.2, 0.2, 0.1])
    x, dy, wide = make(layer, dtype, (7, 6, 5, 3), layout)
    before, priors = running_of(layer), layer.priors.double().tolist()
    expected = oracles.cn(wide[0], LABELS, *wide[1:], before, priors, training=True)
    compare(layer.train(), x, dy, wide, LABELS, expected)
    after, found = oracles.cn_update(wide[0], LABELS, before), running_of(layer)
    assert_close(found.mean, after.mean, 1e-6)
    assert_close(found.var, after.var, 1e-6)
    assert found.tracked == after.tracked


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("affine", [True, False])
def test_cnx(dtype, layout, affine):
    layer = make_cnx(6, 5, [0.4, 0.1, 0.2, 0.2, 0.1], torch.float32, affine=affine)
    x, dy, wide = make(layer, dtype, (7, 6, 5, 3), layout)
    given = wide[1:] if affine else [*wide[1:], 1, 1]
    names = [name for name, _ in layer.named_parameters()]
    print(names)
