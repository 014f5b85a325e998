"""How many kernels ACN, SelfNorm and CrossNorm start; see `test_launches`."""

import pytest
import torch
from torch import nn

import normswap
from tests.functional.triton import test_launches
from tests.functional.triton.test_launches import batch, count

counter = test_launches.counter
PASSES = ["gradient_sums", "differentiate", "finish"]


class Unlabelled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return self.layer(x)


@pytest.mark.parametrize("components", [1, 4, 32])
def test_acn(counter, components):
    layer, x = Unlabelled(normswap.AdaptiveContextNorm(16, components)), batch()[0]
    assert count(counter, layer.train(), x, None) == (["masses", "settle", "mix"], PASSES)
    assert count(counter, layer.eval(), x, None) == (["settle", "mix"], PASSES)
    layer = Unlabelled(normswap.AdaptiveContextNorm(16, components, statistics="learned"))
    assert count(counter, layer, x, None) == (["settle", "mix"], PASSES)


def test_acn_by_instance(counter):
    layer = Unlabelled(normswap.AdaptiveContextNorm(16, 4, assignment="instance"))
    x, expected = batch()[0], (["stats", "assign", "apply"], ["dots", "differentiate", "combine"])
    for training in (True, False):
        assert count(counter, layer.train(training), x, None) == expected
    layer.layer.momentum = None
    assert count(counter, layer.train(), x, None)[0] == ["stats", "assign", "add_", "apply"]


@pytest.mark.parametrize("training", [True, False])
def test_selfnorm(counter, training):
    layer, x = Unlabelled(normswap.SelfNorm(16)).train(training), batch()[0]
    forward, backward = count(counter, layer, x, None)
    assert forward == ["stats", "gate", "apply"]
    assert backward == ["dots", "differentiate", "combine"]


@pytest.mark.parametrize("instances", [1, 2])
def test_crossnorm(counter, instances):
    layer, x = Unlabelled(normswap.CrossNorm("neither", instances, p=1.0)), batch()[0]
    forward, backward = count(counter, layer, x, None)
    assert forward == ["randperm", "stats", "exchange"]
    assert backward == ["dots", "differentiate"]
    layer.layer.p = 0
    assert count(counter, layer, x + 0, None) == ([], [])


def test_maps_cut_into_parts_start_no_more(counter):
    x = torch.randn(2, 16, 99, 99).requires_grad_()
    for layer, number in ((normswap.SelfNorm(16), (3, 3)), (normswap.CrossNorm(p=1.0), (3, 2))):
        assert tuple(map(len, count(counter, Unlabelled(layer), x, None))) == number
