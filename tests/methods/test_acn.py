"""ACN as a layer: values, gradients, statistics, dtypes."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import AdaptiveContextNorm
from normswap.methods.acn_layer import AdaptiveContextNorm as Layer
from tests.support.acn import ASSIGNMENTS, EVERY_KIND, make_acn
from tests.support.builders import assert_close, make_batch, trained_norm
from tests.support.mixture_oracle import acn


def parameters_of(layer):
    return [layer.weight, layer.bias, layer.prior_logits, layer.mu, layer.log_sigma]


def reference(layer, x):
    """Return the oracle's output and moments for a layer in its mode."""
    if layer.options.statistics == "learned":
        given, eps = (layer.mu, torch.exp(2 * layer.log_sigma)), 0.0
    elif layer.training:
        given, eps = None, layer.eps
    else:
        given, eps = (layer.running_mean, layer.running_var), layer.eps
    return acn(x, *parameters_of(layer), layer.options.assignment, given, eps)


def gradients(y, tensors):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return torch.autograd.grad(y, tensors, cotangent)


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_output_and_every_gradient_equal_the_loop(options, training):
    layer, x = make_acn(**options).train(training), make_batch((5, 4, 2, 3)).requires_grad_()
    y, _, _ = reference(layer, x)
    expected = gradients(y, [x, *parameters_of(layer)])
    actual = layer(x)
    assert_close(actual, y)
    for value, other in zip(gradients(actual, [x, *parameters_of(layer)]), expected, strict=True):
        assert_close(value, other, 1e-10)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_running_statistics_follow_the_weighted_moments(assignment, momentum):
    layer = make_acn(assignment=assignment, momentum=momentum)
    layer.num_batches_tracked.zero_()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for step in range(1, 4):
        x = make_batch((5, 4, 6), seed=step)
        _, m, v = reference(layer, x)
        rate = 1 / step if momentum is None else momentum
        mean = mean + rate * (m - mean)
        var = var + rate * (v * 30 / 29 - var)
        layer(x)
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, var)
        assert layer.num_batches_tracked == step


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (2, 4, 3, 5), (1, 4, 2, 3, 2)])
def test_one_component_equals_batch_norm(shape, assignment, momentum):
    base = trained_norm(
        {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)],
        dtype=torch.float64,
        momentum=momentum,
    )
    layer = normswap.convert(base, "acn", components=1, assignment=assignment)
    for training in (True, True, False):
        x = make_batch(shape, seed=int(training)).requires_grad_()
        expected, actual = base.train(training)(x), layer.train(training)(x)
        assert_close(actual, expected)
        pairs = zip(
            gradients(actual, [x, layer.weight, layer.bias]),
            gradients(expected, [x, base.weight, base.bias]),
            strict=True,
        )
        for value, other in pairs:
            assert_close(value, other, 1e-10)
        for name in ("mean", "var"):
            tracked = getattr(base, f"running_{name}")
            assert_close(getattr(layer, f"running_{name}")[0], tracked)


def test_reset_parameters_makes_a_fresh_batch_norm():
    layer, x = make_acn(), make_batch((3, 4, 5))
    layer.reset_parameters()
    assert_close(layer.eval()(x), nn.BatchNorm1d(4).double().eval()(x), 1e-12)


def test_repr_lists_what_is_not_default():
    assert Layer(4).extra_repr() == "4, components=3"
    assert Layer(4, 2, start="jitter").extra_repr() == (
        "4, components=2, start='jitter', strength=0.05"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_dtype_and_memory_format_come_back(options, training, dtype):
    layer = make_acn(dtype=torch.float32, **options).train(training)
    x = make_batch((4, 4, 3, 5), dtype=dtype).to(memory_format=torch.channels_last)
    wide = copy.deepcopy(layer)(x.float().contiguous())
    y = layer(x.requires_grad_())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, wide.to(dtype), 1e-2 if dtype != torch.float32 else 1e-6)
    y.float().sum().backward()
    assert x.grad.dtype == dtype


@EVERY_KIND
def test_autocast_changes_nothing(options):
    layer, x = make_acn(dtype=torch.float32, **options), make_batch((4, 4, 5), dtype=torch.float32)
    plain, cast = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = copy.deepcopy(layer)(plain)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(cast)
    (gradient,) = torch.autograd.grad(actual.square().sum(), cast)
    assert torch.equal(actual, expected)
    assert_close(gradient, torch.autograd.grad(expected.square().sum(), plain)[0], 1e-6)


@EVERY_KIND
def test_single_value_in_training_takes_the_tracked_statistics(options):
    layer, x = make_acn(**options), make_batch((1, 4))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    y = layer.train()(x)
    assert_close(y, layer.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@EVERY_KIND
def test_batch_of_one_with_positions_trains(options):
    layer, x = make_acn(**options), make_batch((1, 4, 3, 3)).requires_grad_()
    y = layer(x)
    assert_close(y, reference(layer, x)[0])
    assert all(g.isfinite().all() for g in gradients(y, [x, *parameters_of(layer)]))


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_empty_batch(options, training):
    layer = make_acn(**options).train(training)
    assert layer(torch.empty(0, 4, 3, 3, dtype=torch.float64)).shape == (0, 4, 3, 3)


def test_wrong_channels_are_named():
    with pytest.raises(normswap.ContextError, match=r"expected input \(N, 4, \*\)"):
        make_acn()(torch.zeros(2, 3, dtype=torch.float64))


def test_every_parameter_exists_before_the_first_forward():
    names = {name for name, _ in AdaptiveContextNorm(4).named_parameters()}
    assert names == {"weight", "bias", "prior_logits", "mu", "log_sigma"}


@EVERY_KIND
@pytest.mark.parametrize("far", [1e2, 1e4, 1e6])
def test_a_fresh_layer_is_batch_norm_far_outside_what_it_was_trained_on(options, far):
    layer = normswap.AdaptiveContextNorm(4, 3, **options).eval()
    x = far * torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4), eps=layer.eps)
    assert float((layer(x).detach() - expected).abs().max()) < 2e-6 * far
