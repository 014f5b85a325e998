"""Conditional instance norm against a float64 loop, and against torch's own instance norm."""

import pytest
import torch
from torch import nn

import normswap
from tests.methods.test_cn import MIXED, PARTLY, gradients
from tests.support import oracles
from tests.support.builders import (
    SKEWED,
    assert_close,
    make_batch,
    make_instance,
    trained_norm,
)

SPATIAL = [(7, 4, 5), (7, 4, 3, 5), (7, 4, 2, 3, 2)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SPATIAL)
def test_forward_equals_loop(shape, training):
    layer, x = make_instance().train(training), make_batch(shape)
    expected = oracles.conditional_instance(x, MIXED, layer.weight, layer.bias)
    assert_close(layer(x, torch.tensor(MIXED)), expected)


@pytest.mark.parametrize("unknown", ["pooled", "posterior", 1])
def test_unlabelled_samples_follow_the_policy(unknown):
    layer, x = make_instance(priors=SKEWED, unknown=unknown), make_batch((7, 4, 3, 5))
    expected = oracles.conditional_instance(
        x, PARTLY, layer.weight, layer.bias, SKEWED, unknown=unknown
    )
    assert_close(layer(x, torch.tensor(PARTLY)), expected)


@pytest.mark.parametrize("labels", [MIXED, PARTLY, [-1] * 7])
def test_gradients_equal_autograd_through_the_loop(labels):
    layer, x = make_instance(priors=SKEWED), make_batch((7, 4, 3, 5)).requires_grad_()
    tensors = (x, layer.weight, layer.bias)
    reference = oracles.conditional_instance(x, labels, layer.weight, layer.bias, SKEWED)
    expected = gradients(reference, tensors)
    for value, other in zip(
        gradients(layer(x, torch.tensor(labels)), tensors), expected, strict=True
    ):
        assert_close(value, other, 1e-10)


def test_gradcheck():
    layer, x = make_instance(2, 2), make_batch((3, 2, 4)).requires_grad_()

    def run(x, weight, bias):
        named = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, named, (x, torch.tensor([1, 0, -1])))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def convert(norm, **settings):
    model = nn.Sequential(norm)
    return normswap.convert(model, "cn", contexts=3, **settings)


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_the_function_in_both_modes(method, affine, tracked, training):
    norm = trained_norm("InstanceNorm2d", affine=affine, track_running_stats=tracked)
    norm = norm.double().train(training)
    model = normswap.convert(nn.Sequential(norm), method, contexts=3, priors=SKEWED)
    model[0].train(training)
    x = make_batch((7, 4, 3, 5))
    actual = model(x, context=torch.tensor(PARTLY))
    assert_close(actual, norm(x))
    if tracked:
        assert_close(model[0].running_mean, norm.running_mean)
        assert_close(model[0].running_var, norm.running_var)


def test_input_without_a_batch_is_one_sample():
    norm = trained_norm("InstanceNorm2d", affine=True).double()
    x = make_batch((1, 4, 3, 5))[0]
    assert_close(convert(norm)[0](x, torch.tensor([2])), norm(x))


def test_contexts_separate_once_their_affine_does():
    model = convert(trained_norm("InstanceNorm2d", affine=True).double())
    x = make_batch((1, 4, 3, 5)).expand(2, -1, -1, -1)
    with torch.no_grad():
        model[0].bias[1] += 1
    y = model(x, context=torch.tensor([0, 1]))
    assert_close(y[1] - y[0], torch.ones_like(y[0]))


def test_base_state_dict_loads_into_a_trained_layer():
    norm = trained_norm("InstanceNorm2d", affine=True, track_running_stats=True).double()
    layer = convert(norm)[0]
    with torch.no_grad():
        layer.weight.mul_(3)
        layer.running_mean.add_(1)
    layer.load_state_dict(norm.state_dict())
    x = make_batch((7, 4, 3, 5))
    assert_close(layer.eval()(x, torch.tensor(MIXED)), norm(x))


def test_one_position_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        make_instance()(make_batch((3, 4, 1, 1)), torch.tensor([0, 1, 2]))
