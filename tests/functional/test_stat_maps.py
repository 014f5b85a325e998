"""The fused layers against float64 loops, in every layout."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.functional import Affine, Centred, apply_centred, stat_affine
from tests.support import oracles
from tests.support.builders import (
    assert_close,
    make_batch,
    make_cn,
    running_of,
)
from tests.support.stat_maps import LABELS, laid_out

FEW = 4
ROUNDOFF = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8}
# The last is large enough for the kernels that take one instance at a time.
SHAPES = [(5, 4, 6), (5, 4, 3, 5), (5, 4, 2, 3, 2), (3, 16, 48, 48)]
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "last", "strided"])


def tables(rows, channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.rand(rows, channels, generator=generator, dtype=torch.float64).add(0.5).to(dtype)
        for _ in range(3)
    ]


def affine_loop(x, centre, scale, shift, rows):
    return torch.stack(
        [
            oracles.affine_sample(x[n], scale[k], shift[k] - centre[k] * scale[k])
            for n, k in enumerate(rows)
        ]
    )


@LAYOUTS
@pytest.mark.parametrize("kind", ["each", "one", "index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_affine_and_its_gradients_equal_a_loop(shape, dtype, kind, layout):
    x = laid_out(make_batch(shape, dtype=dtype), layout).detach().requires_grad_()
    rows = {"each": range(shape[0]), "one": [0] * shape[0], "index": LABELS[: shape[0]]}[kind]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    given = [t.requires_grad_() for t in tables(max(rows) + 1, shape[1], wide)]
    index = torch.tensor(rows) if kind == "index" else None
    y = apply_centred(x, Centred(*given), index)
    reference = [t.detach().double().requires_grad_() for t in (x, *given)]
    expected = affine_loop(*reference, rows)
    cotangent = torch.randn(shape).to(dtype)
    assert y.dtype == dtype
    assert_close(y, expected, 2 * FEW * ROUNDOFF[dtype])
    actual = torch.autograd.grad(y, (x, *given), cotangent)
    wanted = torch.autograd.grad(expected, reference, cotangent.double())
    # Torch's kernel adds a thread's values one after another, which rounds like a random walk.
    few = 64 + (x.numel() / shape[1]) ** 0.5
    for share, a, b in zip([dtype] + [wide] * 3, actual, wanted, strict=False):
        assert_close(a, b, few * ROUNDOFF[share])


def glue(instances, weight, *, replay):
    std = (instances.var + 0.1).sqrt()
    scale = weight * std.flip(0) / std
    return Affine(scale, instances.mean.flip(0) * torch.tanh(instances.mean) + weight)


def glue_loop(x, weight):
    values = x.flatten(2)
    mean = values.mean(2)
    std = ((values - mean.unsqueeze(2)).square().mean(2) + 0.1).sqrt()
    scale = weight * std.flip(0) / std
    shift = mean.flip(0) * torch.tanh(mean) + weight
    return ((values - mean.unsqueeze(2)) * scale.unsqueeze(2) + shift.unsqueeze(2)).view(x.shape)


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_glue_of_instances_equals_autograd_of_the_formula(shape, layout):
    plain = make_batch(shape)
    x = laid_out(plain, layout).detach().requires_grad_()
    weight = tables(1, shape[1])[0].requires_grad_()
    reference = (plain.requires_grad_(), weight)
    y, expected = stat_affine(x, glue, weight), glue_loop(*reference)
    cotangent = torch.randn(shape, dtype=torch.float64)
    assert_close(y, expected)
    actual = torch.autograd.grad(y, (x, weight), cotangent)
    for a, b in zip(actual, torch.autograd.grad(expected, reference, cotangent), strict=True):
        assert_close(a, b, 1e-10)


@pytest.mark.parametrize("mean", [0.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("size", [6, 48])
def test_float32_gradients_far_from_zero_are_as_good_as_batch_norms(size, layout, mean):
    x = laid_out((make_batch((8, 16, size, size), offset=0).float() + mean), layout)
    labels, cotangent = torch.arange(8) % 2, torch.randn_like(x)
    layer = normswap.ContextNorm(16, 2).train()
    norm = nn.BatchNorm2d(16).train()

    def slopes(layer, x, *labels):
        x = x.detach().requires_grad_()
        given = (x, layer.weight)
        found = torch.autograd.grad(layer(x, *labels), given, cotangent[: len(x)].to(x.dtype))
        return [g.double() for g in found]

    def errors(layer, x, *labels):
        exact = slopes(copy.deepcopy(layer).double(), x.double(), *labels)
        rounded = slopes(layer, x, *labels)
        return [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(rounded, exact, strict=True)
        ]

    bound = FEW * max(max(errors(norm, x[labels == k])) for k in range(2))
    assert max(errors(layer, x, labels)) <= bound


def test_one_pass_of_an_autocast_model_keeps_the_gradients_of_float32():
    layer, x = make_cn(dtype=torch.float32).train(), make_batch((5, 4, 6, 6)).float()
    x.requires_grad_()
    labels = torch.tensor(LABELS)
    expected = torch.autograd.grad(copy.deepcopy(layer)(x, labels).sin().sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, labels).sin().sum()
    assert_close(torch.autograd.grad(y, x)[0], expected, FEW * ROUNDOFF[torch.float32])


def test_a_loop_in_float64_agrees_on_maps_of_one_instance_at_a_time():
    x = make_batch((3, 16, 48, 48), dtype=torch.float32)
    layer = make_cn(16, 3, dtype=torch.float32).train()
    before = running_of(layer)
    y = layer(x.contiguous(memory_format=torch.channels_last), torch.tensor([2, 0, 2]))
    given = (layer.weight.double(), layer.bias.double(), before)
    expected = oracles.cn(x.double(), [2, 0, 2], *given, training=True)
    assert_close(y, expected, 2 * FEW * ROUNDOFF[torch.float32])
