"""CN with statistics drawn towards the batch's, and with one affine for all contexts."""

import math

import pytest
import torch

import normswap
from normswap.errors import ConversionError, UnknownNameError
from tests.methods.test_cn import gradients
from tests.support.builders import SKEWED, assert_close, make_batch, make_cn

# Two samples and more of each context: one value a channel has no statistics.
MIXED = [2, 0, 1, 0, 2, 1, 0]
SHRINK = [0.0, 3.0, math.inf]


def moments(x, rows):
    values = x[rows].transpose(0, 1).flatten(1)
    return values.mean(1), values.square().mean(1)


def reference(x, labels, layer):
    """From the definition: means of x and of its square, weighed by numbers of samples."""
    outputs = []
    mean_all, square_all = moments(x, [n for n, k in enumerate(labels) if k >= 0])
    for n, k in enumerate(labels):
        rows = [i for i, other in enumerate(labels) if other == k]
        own = 0.0 if layer.shrink == math.inf else len(rows) / (len(rows) + layer.shrink)
        mean, square = moments(x, rows)
        mean = own * mean + (1 - own) * mean_all
        var = own * square + (1 - own) * square_all - mean.square()
        shape = (-1, *[1] * (x.dim() - 2))
        z = (x[n] - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
        root = 1.0 if layer.shared_affine else math.sqrt(layer.priors[k])
        weight, bias = (
            t if layer.shared_affine else t[k] / root for t in (layer.weight, layer.bias)
        )
        outputs.append(z * weight.view(shape) + bias.view(shape))
    return torch.stack(outputs)


@pytest.mark.parametrize("affine", ["context", "shared"])
@pytest.mark.parametrize("shrink", SHRINK)
@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 3, 5)])
def test_training_equals_the_definition_with_its_gradients(shape, shrink, affine):
    layer = make_cn(priors=SKEWED, shrink=shrink, affine=affine).train()
    x = make_batch(shape).requires_grad_()
    tensors = (x, layer.weight, layer.bias)
    expected = reference(x, MIXED, layer)
    actual = layer(x, torch.tensor(MIXED))
    assert_close(actual, expected)
    pairs = zip(gradients(actual, tensors), gradients(expected, tensors), strict=True)
    for value, other in pairs:
        assert_close(value, other, 1e-10)


def test_running_statistics_take_the_drawn_values():
    layer = make_cn(shrink=math.inf, momentum=1.0).train()
    x = make_batch((7, 4, 3, 5))
    layer(x, torch.tensor(MIXED))
    assert_close(layer.running_mean, x.mean((0, 2, 3)).expand(3, 4))
    for k in range(3):
        values = MIXED.count(k) * 15
        var = x.var((0, 2, 3), correction=0) * values / (values - 1)
        assert_close(layer.running_var[k], var)


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
