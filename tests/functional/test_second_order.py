"""Gradients taken with a graph of their own are the gradients, for every layer and parameter."""

from functools import partial

import pytest
import torch

import normswap
from tests.support.builders import assert_close, make_batch, make_cn, make_cnx, random_

LAYERS = {
    "cn": lambda: make_cn(),
    "cn-x": lambda: make_cnx(),
    "selfnorm": lambda: normswap.SelfNorm(4, 1, "paper"),
    "selfnorm, two gates": lambda: normswap.SelfNorm(4, 2, "paper"),
}
for statistics in ("batch", "learned"):
    for assignment in ("channel", "position", "instance"):
        LAYERS[f"acn, {statistics}, {assignment}"] = partial(
            normswap.AdaptiveContextNorm, 4, 3, statistics=statistics, assignment=assignment
        )


def gradients(run, wanted, create_graph):
    loss = (run() ** 3).sum()
    return torch.autograd.grad(loss, wanted, create_graph=create_graph)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_of_the_gradients_changes_none_of_them(kind, training):
    layer = LAYERS[kind]().double().train(training)
    for seed, parameter in enumerate(layer.parameters()):
        random_(parameter, seed, 0.2, 1.2)
    x = make_batch((5, 4, 3, 2)).requires_grad_()
    labels = (torch.tensor([2, 0, 2, 1, 0]),) if kind in ("cn", "cn-x") else ()
    wanted = [x, *layer.parameters()]
    found = gradients(lambda: layer(x, *labels), wanted, create_graph=True)
    expected = gradients(lambda: layer(x, *labels), wanted, create_graph=False)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("crop", ["neither", "style", "content", "both"])
@pytest.mark.parametrize("instances", [1, 2])
def test_nor_of_those_of_crossnorm(crop, instances):
    layer = normswap.CrossNorm(crop, instances, p=1.0)
    x = make_batch((5, 4, 6, 6)).requires_grad_()

    def run():
        torch.manual_seed(1)
        return layer(x)

    (found,) = gradients(run, [x], create_graph=True)
    (expected,) = gradients(run, [x], create_graph=False)
    assert_close(found, expected, 1e-12)
