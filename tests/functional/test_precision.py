"""Accuracy in float32 and below, dtypes, memory formats, autocast and empty batches.

Float32 errors are judged by torch's own batch norm: its float32 error against its float64 result
on the same data, times FEW.
"""

import copy

import pytest
import torch
from torch import nn

import normswap
from tests.support import oracles
from tests.support.builders import (
    MAKERS,
    assert_close,
    make_batch,
    make_cn,
    make_cnx,
    running_of,
    trained_norm,
)

FEW = 4
LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 0])
# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
FORMATS = [
    ((7, 4, 3, 5), torch.channels_last),
    ((7, 4, 2, 3, 2), torch.channels_last_3d),
    ((1, 4, 3, 5), torch.channels_last),
]


def plain_cn(channels, count, dtype):
    """Return CN whose output is xhat, comparable with batch norm without an affine."""
    return normswap.ContextNorm(channels, count, dtype=dtype).train()


def training_error(x, labels, count):
    """Return CN's float32 error on float32 data against the loop in float64."""
    layer = plain_cn(x.shape[1], count, torch.float64)
    args = (layer.weight, layer.bias, running_of(layer))
    with torch.no_grad():
        expected = oracles.cn(x.double(), labels.tolist(), *args, training=True)
        actual = plain_cn(x.shape[1], count, torch.float32)(x, labels)
    return float((actual.double() - expected).abs().max())


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0, 30000.0])
@pytest.mark.parametrize("shape", [(24, 3, 8, 8), (64, 3, 2), (512, 3)])
def test_training_error_is_a_few_times_batch_norms(shape, mean):
    x = make_batch(shape, offset=0).float() + mean
    labels = torch.arange(shape[0]) % 3
    bound = FEW * max(oracles.batch_norm_error(x[labels == k]) for k in range(3))
    assert training_error(x, labels, 3) <= bound


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_training_error_does_not_grow_with_the_number_of_samples(mean):
    x = (mean + torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))).float()
    labels = torch.arange(20000) % 2
    bound = FEW * max(oracles.batch_norm_error(x[labels == k]) for k in range(2))
    actual = plain_cn(2, 2, torch.float32)(x, labels).detach().double()
    for k in range(2):
        expected = nn.functional.batch_norm(x[labels == k].double(), None, None, training=True)
        assert float((actual[labels == k] - expected).abs().max()) <= bound


def test_training_error_with_contexts_far_apart():
    labels = torch.arange(60) % 3
    x = make_batch((60, 2, 4, 4), offset=0).float() + 2000.0 * labels.reshape(-1, 1, 1, 1)
    bound = FEW * max(oracles.batch_norm_error(x[labels == k]) for k in range(3))
    assert training_error(x, labels, 3) <= bound


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("unknown", ["pooled", "posterior", "1"])
@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_converted_error_is_a_few_times_batch_norms(method, unknown, mean):
    x = make_batch((7, 4, 3, 5), offset=0).float() + mean
    norm = trained_norm()
    norm.running_mean.copy_(x.mean((0, 2, 3)))
    norm.running_var.copy_(x.var((0, 2, 3)))
    bound = FEW * float((norm(x).double() - nn_double(norm)(x.double())).detach().abs().max())
    layer = normswap.convert(nn.Sequential(norm), method, contexts=3, unknown=unknown)
    for labels in (LABELS, None, [None, 0, 1, 2, None, 1, 0]):
        actual = layer(x, context=labels).detach().double()
        assert float((actual - nn_double(norm)(x.double())).detach().abs().max()) <= bound


def nn_double(norm):
    wide = nn.BatchNorm2d(norm.num_features, eps=norm.eps).double().eval()
    wide.load_state_dict(norm.state_dict())
    return wide


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_loses_only_the_rounding_of_the_output(dtype, training, kind):
    layer = MAKERS[kind](4, 3, dtype=torch.float32).train(training)
    wide = MAKERS[kind](4, 3).train(training)
    x = make_batch((7, 4, 3, 5)).to(dtype)
    y = layer(x, LABELS)
    assert y.dtype == dtype
    assert_close(y, wide(x.double(), LABELS), 1.01 * ROUNDOFF[dtype])


@pytest.mark.parametrize("make", [make_cn, make_cnx])
def test_large_half_precision_values_do_not_overflow(make):
    layer, x = make(4, 3, dtype=torch.float32).train(), make_batch((7, 4, 6, 6))
    x = (30000 + 1000 * x).clamp(max=60000).half()
    assert layer(x, LABELS).isfinite().all()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_in_a_dtype_returns_it(dtype, training, kind):
    layer = MAKERS[kind](4, 3, dtype=dtype).train(training)
    x = make_batch((7, 4, 3, 5)).to(dtype).requires_grad_()
    y = layer(x, LABELS)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype for p in layer.parameters())
    assert all(b.dtype == dtype for n, b in layer.named_buffers() if n.startswith("running"))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
def test_memory_format_is_kept(shape, memory_format, training, kind):
    layer = MAKERS[kind]().train(training)
    plain = make_batch(shape).requires_grad_()
    x = plain.detach().clone(memory_format=memory_format).requires_grad_()
    labels = LABELS[: shape[0]]
    actual, expected = layer(x, labels), layer(plain, labels)
    assert actual.is_contiguous(memory_format=memory_format)
    assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert_close(x.grad, plain.grad, 1e-10)


@pytest.mark.parametrize("make", [make_cn, make_cnx])
def test_input_that_is_not_contiguous(make):
    layer, x = make().train(), make_batch((7, 5, 3, 4)).permute(0, 3, 1, 2)
    assert_close(layer(x, LABELS), layer(x.contiguous(), LABELS))


@pytest.mark.parametrize("make", [make_cn, make_cnx])
@pytest.mark.parametrize("unknown", ["pooled", "posterior"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_lower_the_precision_inside(training, unknown, make):
    layer = make(4, 3, dtype=torch.float32, unknown=unknown).train(training)
    x, labels = make_batch((7, 4, 3, 5), offset=20).float(), [2, -1, 0, 0, -1, 2, 2]
    expected = copy.deepcopy(layer)(x, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(x, labels)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, FEW * ROUNDOFF[torch.float32])


def test_autocast_keeps_the_mixed_affine_of_unknown_instances():
    layer = MAKERS["instance"](4, 3, dtype=torch.float32)
    x, labels = make_batch((7, 4, 3, 5)).float(), [2, -1, 0, 0, -1, 2, 2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(x, labels)
    assert_close(actual, layer(x, labels), FEW * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("make", [make_cn, make_cnx])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unknown", ["pooled", "posterior"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 5)])
def test_batch_of_zero_samples(shape, unknown, training, make):
    layer = make(unknown=unknown).train(training)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    x = make_batch(shape).requires_grad_()
    y = layer(x, torch.empty(0, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == shape
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), name


def test_posterior_with_contexts_far_from_zero():
    layer = make_cn(4, 3, dtype=torch.float32, unknown="posterior").eval()
    with torch.no_grad():
        layer.running_mean.add_(300.0)
    x = make_batch((7, 4, 3, 5)).float() + 300.0
    expected = oracles.cn(
        x.double(),
        [-1] * 7,
        layer.weight.double(),
        layer.bias.double(),
        running_of(layer),
        unknown="posterior",
    )
    # The inputs are rounded at 300, which moves the log-likelihoods by as much as the distances.
    assert_close(layer(x), expected, 300 * 2 * FEW * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooled_error_after_a_cast_is_a_few_times_batch_norms(dtype, method):
    norm, x = trained_norm(), make_batch((7, 4, 3, 5)).to(dtype)
    norm.running_mean.fill_(30.0)
    x = x + 30
    wide = nn_double(norm)(x.double())
    model = normswap.convert(nn.Sequential(norm), method, contexts=3, priors=[0.7, 0.2, 0.1])
    error = float((model.to(dtype)(x).double() - wide).detach().abs().max())
    assert error <= FEW * float((norm.to(dtype)(x).double() - wide).detach().abs().max())
