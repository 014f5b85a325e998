"""CN-X on batch statistics against float64 loops and torch's own batch norm."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import BatchContextNormX
from normswap.functional.moments import Moments
from tests.methods.test_cn import MIXED, PARTLY, gradients
from tests.support import oracles
from tests.support.builders import (
    POLICIES,
    SKEWED,
    assert_close,
    make_batch,
    random_,
    trained_norm,
)


def make_layer(**settings) -> BatchContextNormX:
    given = torch.tensor(SKEWED, dtype=torch.float64)
    layer = BatchContextNormX(4, 3, priors=given, dtype=torch.float64, **settings)
    names = ("weight", "bias", "mu", "log_sigma", "running_mean", "running_var")
    for seed, name in enumerate(names):
        tensor = getattr(layer, name)
        if tensor is not None:
            random_(tensor, seed, 0.3, 1.5)
    return layer


def reference(x, labels, layer):
    if layer.training:
        values = x.transpose(0, 1).flatten(1)
        mean, var = values.mean(1), values.var(1, correction=0)
    else:
        mean, var = layer.running_mean, layer.running_var
    shape = (-1, *[1] * (x.dim() - 2))
    z = (x - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
    learned = (layer.weight, layer.bias, layer.mu, layer.log_sigma)
    return oracles.cnx(z, labels, *learned, SKEWED, layer.unknown)


@pytest.mark.parametrize("labels", [MIXED, PARTLY])
@pytest.mark.parametrize("unknown", POLICIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_equals_the_loop_with_its_gradients(shape, training, unknown, labels):
    layer = make_layer(unknown=unknown).train(training)
    x = make_batch(shape).requires_grad_()
    tensors = (x, layer.weight, layer.bias, layer.mu, layer.log_sigma)
    expected = reference(x, labels, layer)
    actual = layer(x, torch.tensor(labels))
    assert_close(actual, expected)
    pairs = zip(gradients(actual, tensors), gradients(expected, tensors), strict=True)
    for value, other in pairs:
        assert_close(value, other, 1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_trains_as_the_batch_norm_does_while_contexts_are_alike(momentum):
    norm = trained_norm(dtype=torch.float64, momentum=momentum).train()
    model = normswap.convert(nn.Sequential(norm), "cn-x", contexts=3, statistics="batch")
    for turn in range(3):
        x = make_batch((7, 4, 3, 5), seed=turn)
        assert_close(model(x, context=torch.tensor(MIXED)), norm(x))
    for name, buffer in norm.named_buffers():
        assert_close(getattr(model[0], name), buffer)


def test_one_value_a_channel_moves_nothing():
    layer = make_layer().train()
    before = copy.deepcopy(layer.state_dict())
    layer(make_batch((1, 4)), torch.tensor([0]))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_frozen_statistics_serve_in_training():
    model = normswap.convert(
        nn.Sequential(trained_norm(dtype=torch.float64)), "cn-x", contexts=3, statistics="batch"
    )
    normswap.freeze(model, "all", stats="frozen")
    x = make_batch((7, 4, 3, 5))
    expected = model.eval()(x, context=torch.tensor(MIXED))
    assert_close(model.train()(x, context=torch.tensor(MIXED)), expected)


def test_statistics_of_a_context_can_be_set():
    layer = make_layer().eval()
    mean, var = (torch.full((4,), value, dtype=torch.float64) for value in (1, 2))
    layer.set_moments(1, Moments(mean, var))
    assert_close(layer.moments().mean[1], mean)
    assert_close(layer.moments().var[1], var + layer.eps)
