"""CN against float64 loops, and against torch's own batch norm."""

import pytest
import torch
from torch import nn

from tests.support import oracles
from tests.support.builders import (
    POLICIES,
    SHAPES,
    SKEWED,
    assert_close,
    make_batch,
    make_cn,
    running_of,
)

MIXED = [2, 0, 1, 0, 2, 2, 0]
PARTLY = [2, -1, 0, 0, -1, 2, 2]


def gradients(outputs, tensors):
    generator = torch.Generator().manual_seed(9)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    return torch.autograd.grad(outputs, tensors, cotangent)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_loop_over_contexts(shape, training):
    layer, x = make_cn(priors=SKEWED).train(training), make_batch(shape)
    expected = oracles.cn(
        x, MIXED, layer.weight, layer.bias, running_of(layer), SKEWED, training=training
    )
    assert_close(layer(x, torch.tensor(MIXED)), expected)


@pytest.mark.parametrize("unknown", POLICIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_unlabelled_samples_follow_the_policy(shape, training, unknown):
    layer, x = make_cn(priors=SKEWED, unknown=unknown).train(training), make_batch(shape)
    expected = oracles.cn(
        x,
        PARTLY,
        layer.weight,
        layer.bias,
        running_of(layer),
        SKEWED,
        unknown=unknown,
        training=training,
    )
    assert_close(layer(x, torch.tensor(PARTLY)), expected)


@pytest.mark.parametrize("unknown", POLICIES)
def test_no_labels_in_eval_equals_every_label_unknown(unknown):
    layer, x = make_cn(priors=SKEWED, unknown=unknown).eval(), make_batch((7, 4, 3, 5))
    expected = oracles.cn(
        x, [-1] * 7, layer.weight, layer.bias, running_of(layer), SKEWED, unknown=unknown
    )
    assert_close(layer(x), expected)


@pytest.mark.parametrize("labels", [MIXED, PARTLY, [0, 0, 0, 0, 1, 1, 1]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unknown", POLICIES)
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_gradients_equal_autograd_through_the_loop(shape, unknown, training, labels):
    layer = make_cn(priors=SKEWED, unknown=unknown).train(training)
    x = make_batch(shape).requires_grad_()
    tensors = (x, layer.weight, layer.bias)
    expected = gradients(
        oracles.cn(
            x,
            labels,
            layer.weight,
            layer.bias,
            running_of(layer),
            SKEWED,
            unknown=unknown,
            training=training,
        ),
        tensors,
    )
    for actual, reference in zip(
        gradients(layer(x, torch.tensor(labels)), tensors), expected, strict=True
    ):
        assert_close(actual, reference, 1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unknown", ["pooled", "posterior"])
def test_gradcheck(training, unknown):
    layer = make_cn(2, 2, unknown=unknown).train(training)
    x = make_batch((4, 2, 3)).requires_grad_()
    labels = torch.tensor([1, 0, -1, 1])

    def run(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        return torch.func.functional_call(layer, {**parameters, **buffers}, (x, labels))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("momentum", [0.1, 0.4, 1.0, None])
def test_running_statistics_over_several_steps(momentum):
    layer = make_cn(momentum=momentum).train()
    expected = running_of(layer)
    steps = [MIXED, [0, 0, 0, 0, 0, 0, 0], [1, 2, 2, 2, 1, 2, 2], PARTLY, [-1] * 7, MIXED]
    for step, labels in enumerate(steps):
        x = make_batch((7, 4, 2, 3), seed=step)
        layer(x, torch.tensor(labels))
        expected = oracles.cn_update(x, labels, expected, momentum)
    assert_close(layer.running_mean, expected.mean)
    assert_close(layer.running_var, expected.var)
    assert layer.num_batches_tracked.tolist() == expected.tracked


def test_absent_context_is_left_alone():
    layer = make_cn().train()
    before = running_of(layer)
    layer(make_batch((7, 4, 3)), torch.tensor([0, 2, 2, 0, 0, 2, 2]))
    assert torch.equal(layer.running_mean[1], before.mean[1])
    assert torch.equal(layer.running_var[1], before.var[1])
    assert layer.num_batches_tracked.tolist() == [1, 0, 1]


def test_absent_context_gets_zero_gradient():
    layer = make_cn().train()
    layer(make_batch((4, 4, 3)), torch.tensor([0, 2, 2, 0])).square().sum().backward()
    assert torch.equal(layer.weight.grad[1], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(layer.bias.grad[1], torch.zeros(4, dtype=torch.float64))


def test_single_value_uses_running_statistics_and_does_not_update_them():
    layer, x = make_cn().train(), make_batch((3, 4))
    before, labels = running_of(layer), [0, 1, 0]
    expected = oracles.cn(x, labels, layer.weight, layer.bias, before, training=True)
    assert_close(layer(x, torch.tensor(labels)), expected)
    assert torch.equal(layer.running_mean[1], before.mean[1])
    assert torch.equal(layer.running_var[1], before.var[1])
    assert layer.num_batches_tracked.tolist() == [1, 0, 0]


def test_single_sample_with_positions_has_batch_statistics():
    layer, x = make_cn().train(), make_batch((1, 4, 6))
    expected = oracles.cn(x, [1], layer.weight, layer.bias, running_of(layer), training=True)
    assert_close(layer(x, torch.tensor([1])), expected)
    assert layer.num_batches_tracked.tolist() == [0, 1, 0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_stays_in_its_context(bad):
    layer, x = make_cn().train(), make_batch((5, 4))
    x[4] = bad
    before = running_of(layer)
    y = layer(x, torch.tensor([0, 0, 1, 1, 2]))
    assert y[:4].isfinite().all()
    assert torch.equal(layer.running_mean[2], before.mean[2])
    assert torch.equal(layer.running_var[2], before.var[2])


def test_unlabelled_samples_update_nothing():
    layer = make_cn().train()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer(make_batch((3, 4, 5)), torch.tensor([-1, -1, -1]))
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("kind", "shape"), [("1d", (6, 4)), ("2d", (6, 4, 3, 5))])
def test_one_context_equals_batch_norm(kind, shape, momentum):
    batch_norm = getattr(nn, f"BatchNorm{kind}")(4, momentum=momentum, eps=0.01).double()
    layer = make_cn(4, 1, momentum=momentum, eps=0.01)
    batch_norm.load_state_dict(
        {
            "weight": layer.weight[0],
            "bias": layer.bias[0],
            "running_mean": layer.running_mean[0],
            "running_var": layer.running_var[0],
            "num_batches_tracked": layer.num_batches_tracked[0],
        }
    )
    for step in range(3):
        x = make_batch(shape, seed=step)
        assert_close(layer(x), batch_norm(x))
    assert_close(layer.running_mean[0], batch_norm.running_mean)
    assert_close(layer.running_var[0], batch_norm.running_var)
    assert layer.num_batches_tracked[0] == batch_norm.num_batches_tracked
    layer.eval(), batch_norm.eval()
    assert_close(layer(x), batch_norm(x))


def test_batch_of_one_context_equals_batch_norm():
    layer, batch_norm = make_cn(priors=SKEWED).train(), nn.BatchNorm2d(4).double().train()
    batch_norm.load_state_dict(
        {
            "weight": layer.weight[2] / 0.1**0.5,
            "bias": layer.bias[2] / 0.1**0.5,
            "running_mean": layer.running_mean[2],
            "running_var": layer.running_var[2],
            "num_batches_tracked": layer.num_batches_tracked[2],
        }
    )
    x = make_batch((5, 4, 3, 2))
    assert_close(layer(x, torch.full((5,), 2)), batch_norm(x))
    assert_close(layer.running_mean[2], batch_norm.running_mean)
    assert_close(layer.running_var[2], batch_norm.running_var)


def test_eps_is_added_to_the_variance():
    layer, x = make_cn(eps=0.7).train(), make_batch((7, 4, 3))
    expected = oracles.cn(
        x, MIXED, layer.weight, layer.bias, running_of(layer), eps=0.7, training=True
    )
    assert_close(layer(x, torch.tensor(MIXED)), expected)


def test_constant_channel_gives_finite_output_and_gradient():
    layer, x = make_cn().train(), make_batch((4, 4, 3))
    x[:, 1] = 3.0
    x.requires_grad_()
    y = layer(x, torch.tensor([0, 1, 0, 1]))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_backward_after_a_later_training_forward():
    layer = make_cn(unknown="pooled").eval()
    x = make_batch((7, 4, 3)).requires_grad_()
    labels = torch.tensor(PARTLY)
    reference = oracles.cn(x, PARTLY, layer.weight, layer.bias, running_of(layer))
    expected = gradients(reference, (x, layer.weight))
    first = layer(x, labels)
    layer.train()(x, labels)
    for actual, value in zip(gradients(first, (x, layer.weight)), expected, strict=True):
        assert_close(actual, value, 1e-10)


def test_eval_changes_no_state():
    layer = make_cn().eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(make_batch((7, 4, 3)), torch.tensor(MIXED))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_fresh_layer_outputs_the_same_for_every_context():
    layer = make_cn(priors=SKEWED)
    layer.reset_parameters()
    layer.eval()
    x = make_batch((1, 4, 5)).expand(3, -1, -1)
    y = layer(x, torch.tensor([0, 1, 2]))
    assert_close(y, x / (1 + 1e-5) ** 0.5)


def test_training_output_does_not_depend_on_grad_mode():
    x, labels = make_batch((7, 4, 3)), torch.tensor(PARTLY)
    expected = make_cn().train()(x, labels)
    with torch.no_grad():
        assert torch.equal(make_cn().train()(x, labels), expected)
