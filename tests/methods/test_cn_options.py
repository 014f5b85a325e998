"""CN with statistics drawn towards the batch's, and with one affine for all contexts."""

import math

import pytest
import torch

import normswap
from normswap.errors import ConversionError, UnknownNameError
from tests.methods.test_cn import PARTLY, gradients
from tests.support import oracles
from tests.support.builders import POLICIES, SKEWED, assert_close, make_batch, make_cn, running_of

# Two samples and more of each context: one value a channel has no statistics.
MIXED = [2, 0, 1, 0, 2, 1, 0]
SHRINK = [0.0, 3.0, math.inf]


def reference(x, labels, layer):
    tensors, how = (layer.weight, layer.bias, running_of(layer)), {"shrink": layer.shrink}
    how |= {"priors": SKEWED, "unknown": layer.unknown, "training": layer.training}
    return oracles.cn(x, labels, *tensors, **how)


@pytest.mark.parametrize(
    ("labels", "unknown"), [(MIXED, "pooled"), *((PARTLY, policy) for policy in POLICIES)]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
@pytest.mark.parametrize("affine", ["context", "shared"])
@pytest.mark.parametrize("shrink", SHRINK)
def test_outputs_and_gradients_equal_the_loop(shrink, affine, shape, training, labels, unknown):
    layer = make_cn(priors=SKEWED, shrink=shrink, affine=affine, unknown=unknown).train(training)
    x = make_batch(shape).requires_grad_()
    tensors = (x, layer.weight, layer.bias)
    expected = reference(x, labels, layer)
    actual = layer(x, torch.tensor(labels))
    assert_close(actual, expected)
    pairs = zip(gradients(actual, tensors), gradients(expected, tensors), strict=True)
    for value, other in pairs:
        assert_close(value, other, 1e-10)


@pytest.mark.parametrize("affine", ["context", "shared"])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shrink", SHRINK)
def test_running_statistics_take_the_drawn_values(shrink, momentum, affine):
    layer = make_cn(shrink=shrink, momentum=momentum, affine=affine).train()
    expected = running_of(layer)
    for step, labels in enumerate([MIXED, [0, 0, 2, 2, 2, 0, 0], PARTLY]):
        x = make_batch((7, 4, 3, 5), seed=step)
        layer(x, torch.tensor(labels))
        expected = oracles.cn_update(x, labels, expected, momentum, shrink)
    assert_close(layer.running_mean, expected.mean)
    assert_close(layer.running_var, expected.var)
    assert layer.num_batches_tracked.tolist() == expected.tracked


def test_a_shared_affine_keeps_the_keys_of_the_norm():
    base = torch.nn.Sequential(torch.nn.BatchNorm2d(4, dtype=torch.float64)).eval()
    model = normswap.convert(base, "cn", contexts=3, affine="shared")
    assert model[0].weight.shape == (4,)
    base[0].weight.data.fill_(3.0)
    model.load_state_dict(base.state_dict())
    x = make_batch((3, 4, 2, 2))
    assert_close(model(x, context=torch.tensor([0, 1, 2])), base(x))


@pytest.mark.parametrize(
    ("options", "error"),
    [({"shrink": -1.0}, ConversionError), ({"affine": "none"}, UnknownNameError)],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        normswap.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(2)), "cn", **options)
