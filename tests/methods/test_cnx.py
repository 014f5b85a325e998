"""CN-X against float64 loops, and against torch's own batch norm in eval mode."""

import pytest
import torch
from torch import nn

import normswap
from tests.methods.test_cn import MIXED, PARTLY, gradients
from tests.support import oracles
from tests.support.builders import (
    POLICIES,
    SHAPES,
    SKEWED,
    assert_close,
    make_batch,
    make_cnx,
)


def parameters_of(layer):
    return layer.weight, layer.bias, layer.mu, layer.log_sigma


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_loop(shape, training):
    layer, x = make_cnx().train(training), make_batch(shape)
    expected = oracles.cnx(x, MIXED, *parameters_of(layer))
    assert_close(layer(x, torch.tensor(MIXED)), expected)


@pytest.mark.parametrize("labels", [PARTLY, [-1] * 7])
@pytest.mark.parametrize("unknown", POLICIES)
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_unlabelled_samples_follow_the_policy(shape, unknown, labels):
    layer, x = make_cnx(priors=SKEWED, unknown=unknown), make_batch(shape)
    expected = oracles.cnx(x, labels, *parameters_of(layer), SKEWED, unknown)
    assert_close(layer(x, torch.tensor(labels)), expected)


@pytest.mark.parametrize("unknown", POLICIES)
def test_no_labels_in_eval_equals_every_label_unknown(unknown):
    layer, x = make_cnx(priors=SKEWED, unknown=unknown).eval(), make_batch((7, 4, 3, 5))
    assert_close(layer(x), oracles.cnx(x, [-1] * 7, *parameters_of(layer), SKEWED, unknown))


@pytest.mark.parametrize("labels", [MIXED, PARTLY, [0, 0, 0, 0, 1, 1, 1]])
@pytest.mark.parametrize("unknown", POLICIES)
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_gradients_equal_autograd_through_the_loop(shape, unknown, labels):
    layer = make_cnx(priors=SKEWED, unknown=unknown).train()
    x = make_batch(shape).requires_grad_()
    tensors = (x, *parameters_of(layer))
    reference = oracles.cnx(x, labels, *parameters_of(layer), SKEWED, unknown)
    expected = gradients(reference, tensors)
    actual = gradients(layer(x, torch.tensor(labels)), tensors)
    for value, other in zip(actual, expected, strict=True):
        assert_close(value, other, 1e-10)


@pytest.mark.parametrize("unknown", ["pooled", "posterior"])
def test_gradcheck(unknown):
    layer = make_cnx(2, 2, unknown=unknown)
    x = make_batch((4, 2, 3)).requires_grad_()
    labels = torch.tensor([1, 0, -1, 1])

    def run(x, *values):
        named = dict(zip(("weight", "bias", "mu", "log_sigma"), values, strict=True))
        return torch.func.functional_call(layer, named, (x, labels))

    assert torch.autograd.gradcheck(run, (x, *parameters_of(layer)))


def test_training_and_eval_compute_the_same():
    layer, x, labels = make_cnx(), make_batch((7, 4, 3, 5)), torch.tensor(MIXED)
    assert torch.equal(layer.train()(x, labels), layer.eval()(x, labels))


def test_training_changes_no_state():
    layer = make_cnx().train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(make_batch((7, 4, 3)), torch.tensor(MIXED))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_absent_context_gets_zero_gradient():
    layer = make_cnx().train()
    layer(make_batch((4, 4, 3)), torch.tensor([0, 2, 2, 0])).square().sum().backward()
    assert torch.equal(layer.mu.grad[1], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(layer.log_sigma.grad[1], torch.zeros(4, dtype=torch.float64))


def test_single_value_needs_no_batch():
    layer, x = make_cnx().train(), make_batch((1, 4))
    assert_close(layer(x, torch.tensor([2])), oracles.cnx(x, [2], *parameters_of(layer)))


def test_without_affine_gamma_is_one_and_beta_zero():
    layer, x = make_cnx(affine=False), make_batch((7, 4, 3))
    assert layer.weight is None
    assert layer.bias is None
    ones = torch.ones(4, dtype=torch.float64)
    expected = oracles.cnx(x, MIXED, ones, torch.zeros_like(ones), layer.mu, layer.log_sigma)
    assert_close(layer(x, torch.tensor(MIXED)), expected)


@pytest.mark.parametrize(
    "labels", [MIXED, [0, 0, 2, 2, 0, 0, 2], [0, 0, 2, 2, 0, 0, 1], [0, -1, 1, 1, -1, 0, 0]]
)
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_fresh_layer_starts_from_its_first_training_batch(shape, labels):
    layer = normswap.ContextNormX(4, 3, dtype=torch.float64, eps=0.01).train()
    x = make_batch(shape)
    mu, log_sigma = oracles.cnx_start(x, labels, 3, 0.01)
    y = layer(x, torch.tensor(labels))
    assert_close(layer.mu, mu)
    assert_close(layer.log_sigma, log_sigma)
    assert_close(y, oracles.cnx(x, labels, layer.weight, layer.bias, mu, log_sigma))


def test_start_is_taken_once():
    layer = normswap.ContextNormX(4, 3, dtype=torch.float64).train()
    layer(make_batch((7, 4, 3)), torch.tensor(MIXED))
    before = layer.mu.detach().clone()
    layer(make_batch((7, 4, 3), seed=1, offset=5), torch.tensor(MIXED))
    assert torch.equal(layer.mu, before)


def test_fresh_layer_in_eval_is_an_identity():
    layer, x = normswap.ContextNormX(4, 3, dtype=torch.float64).eval(), make_batch((7, 4, 3))
    assert_close(layer(x, torch.tensor(MIXED)), x)


@pytest.mark.parametrize("samples", [0, 1])
def test_a_batch_without_spread_is_no_start(samples):
    layer = normswap.ContextNormX(4, 3, dtype=torch.float64).train()
    layer(make_batch((samples, 4)), torch.zeros(samples, dtype=torch.int64))
    x = make_batch((7, 4))
    layer(x, torch.tensor(MIXED))
    mu, log_sigma = oracles.cnx_start(x, MIXED, 3, 1e-5)
    assert_close(layer.mu, mu)
    assert_close(layer.log_sigma, log_sigma)


def test_fresh_start_trains():
    layer = normswap.ContextNormX(4, 3, dtype=torch.float64).train()
    layer(make_batch((7, 4, 3)), torch.tensor(MIXED)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_fresh_layer_is_still_fresh_after_save_and_load():
    saved = normswap.ContextNormX(4, 3, dtype=torch.float64)
    layer = normswap.ContextNormX(4, 3, dtype=torch.float64)
    layer.load_state_dict(saved.state_dict())
    x = make_batch((7, 4, 3))
    layer.train()(x, torch.tensor(MIXED))
    assert_close(layer.mu, oracles.cnx_start(x, MIXED, 3, 1e-5)[0])


def test_a_started_layer_does_not_start_again_after_save_and_load():
    saved, layer = make_cnx(), normswap.ContextNormX(4, 3, dtype=torch.float64)
    layer.load_state_dict(saved.state_dict())
    layer.train()(make_batch((7, 4, 3)), torch.tensor(MIXED))
    assert torch.equal(layer.mu, saved.mu)


def test_equal_contexts_equal_batch_norm_in_eval():
    batch_norm = nn.BatchNorm2d(4).double().eval()
    layer = make_cnx()
    batch_norm.load_state_dict(
        {
            "weight": layer.weight,
            "bias": layer.bias,
            "running_mean": layer.mu[1],
            "running_var": (2 * layer.log_sigma[1]).exp() - batch_norm.eps,
            "num_batches_tracked": torch.tensor(0),
        }
    )
    x = make_batch((5, 4, 3, 2))
    assert_close(layer(x, torch.ones(5, dtype=torch.int64)), batch_norm(x))
