"""What the passes over x compute, on a CPU by the interpreter or on a GPU; see `test_values`."""

import copy

import pytest
import torch
import triton
import triton.language as tl

import normswap
from normswap.functional import backend, kernels
from normswap.functional.triton import tile
from normswap.functional.triton.launching import launch
from tests.functional.triton.values import DEVICE, EVERY_CASE, SHARE, make
from tests.support.builders import assert_close, make_batch

pytestmark = pytest.mark.usefixtures("on_the_device")


@EVERY_CASE
def test_the_passes_over_x(dtype, layout):
    for shape in ((3, 3, 5, 3), (1, 3, 60, 40)):
        x, dy = (t.detach() for t in make(shape, dtype, layout))
        v, g = x.double().flatten(2), dy.double().flatten(2)
        one, two, three, centre = make_batch((4, *shape[:2]), 2, dtype=torch.float32).to(DEVICE)
        a, b, c, m = (t.double().unsqueeze(2) for t in (one, two, three, centre))
        share = SHARE[dtype]
        found = kernels.stats(x)
        assert_close(found.mean, v.mean(2), 1e-6)
        assert_close(found.var, v.var(2, correction=0), 1e-5)
        assert_close(kernels.affine(x, one, two).flatten(2), a * v + b, share)
        assert_close(kernels.affine(x, one[:1], None).flatten(2), a[:1] * v, share)
        found = kernels.combine(dy, x, one, two, three, centre)
        assert_close(found.flatten(2), a * g + b * (v - m) + c, share)
        dx, first, second = kernels.scale_and_dot(dy, x, centre, one)
        assert_close(dx.flatten(2), a * g, share)
        assert_close(first, g.sum(2), 1e-5)
        assert_close(second, (g * (v - m)).sum(2), 1e-5)
        first, second = kernels.dot(dy, x, centre[:1])
        assert_close(first, g.sum((0, 2)).unsqueeze(0), 1e-5)
        assert_close(second, (g * (v - m[:1])).sum((0, 2)).unsqueeze(0), 1e-5)
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["selfnorm", "crossnorm"])
def test_other_methods_use_the_passes(kind, layout, monkeypatch):
    layer = (
        normswap.SelfNorm(3, 1, "paper").to(DEVICE)
        if kind == "selfnorm"
        else normswap.CrossNorm(p=1.0)
    )
    x, dy = make(layout=layout)

    def run():
        torch.manual_seed(0)
        y = copy.deepcopy(layer)(x)
        return y, *torch.autograd.grad(y, [x], dy)

    found = run()
    monkeypatch.setenv("NORMSWAP_TRITON", "0")
    backend._works.cache_clear()
    plain = run()
    backend._works.cache_clear()
    for a, b in zip(found, plain, strict=True):
        assert_close(a, b, 1e-5)


@triton.jit
def _ends(out, C, M, sn, sm, sc, S, PART, BM: tl.constexpr, BC: tl.constexpr):
    """Write where a program starts to read, and how far its tile reaches."""
    _, _, _, _, _, first, within = tile.locate(C, M, sn, sm, sc, S, PART, BM, BC)
    tl.store(out + 2 * tl.program_id(0), first)
    tl.store(out + 2 * tl.program_id(0) + 1, tl.max(within))


@pytest.mark.parametrize("last", [True, False])
def test_offsets_beyond_int32(last):
    channels, positions, parts, rows, columns = 6, 2**29, 2, 4, 4
    across, down = (1, channels) if last else (positions, 1)
    part = positions // parts
    strides = (channels * positions, down, across)
    out = torch.zeros(2 * parts * 2, 2, dtype=torch.int64, device=DEVICE)
    geometry = (channels, positions, *strides, parts, part)
    launch(_ends, len(out), out, *geometry, BM=rows, BC=columns)
    expected = [
        [n * channels * positions + s * part * down + c * across, 3 * down + 3 * across]
        for n in range(2)
        for s in range(parts)
        for c in (0, columns)
    ]
    assert max(expected)[0] > 2**32
    assert out.tolist() == expected
