"""What the kernels of CN-X compute for samples that weigh the contexts, each for itself."""

import pytest
import torch
from torch import nn

import normswap
from normswap.functional import backend
from normswap.functional.labels import Context
from normswap.methods import cnx_layer
from tests.functional.triton.values import (
    DEVICE,
    EVERY_CASE,
    LABELS,
    PRIORS,
    as_labels,
    compare,
    make,
    make_weighing_cnx,
)
from tests.support import oracles
from tests.support.builders import assert_close
from tests.support.sampling import sampled

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture
def only_kernels(monkeypatch):
    """Fail where torch's operators serve."""
    monkeypatch.delattr(cnx_layer, "apply_by_label")


def compare_cnx(layer, x, dy, labels, share=None, oracle=oracles.cnx):
    """Hold a layer to the loop in float64; the host does not know whether a label is -1."""
    given = None if labels is None else Context(as_labels(labels), None)
    settings = {"priors": layer.priors.tolist(), "unknown": "posterior"}
    compare(layer, x, dy, labels, oracle, share, given=given, **settings)


@EVERY_CASE
def test_values_and_all_gradients(dtype, layout, only_kernels):
    layer = make_weighing_cnx(3, 4, PRIORS, torch.float32).train()
    compare_cnx(layer, *make((7, 3, 5, 3), dtype, layout, offset=0.1), LABELS)


SMALL = (3, 2, 2, 2)
SOME, ALL, NONE = [2, -1, 1, 1, -1], [-1] * 5, [0, 2, 0, 1, 1]
WEIGHED = [(3, ALL), (3, None), (3, NONE), (2, SOME)]
OTHERS = [(64, SOME), (64, None), (33, ALL), (1, SOME), (65, SOME), (260, SOME)]


@pytest.mark.parametrize(("contexts", "labels"), sampled(WEIGHED + OTHERS, len(WEIGHED)))
def test_some_all_and_no_samples_weigh_the_contexts(contexts, labels):
    layer = make_weighing_cnx(3, contexts, None, torch.float32).eval()
    if labels is not None:
        labels = [min(label, contexts - 1) for label in labels]
    compare_cnx(layer, *make((5, 3, 4, 2), offset=0.1), labels)


@pytest.mark.parametrize(
    ("shape", "layout"),
    sampled(
        [
            ((1, 4, 1, 1), "contiguous"),
            ((1, 3, 7), "contiguous"),
            ((3, 2, 3, 4, 5), "channels_last"),
            ((6, 4, 1, 1), "channels_last"),
            ((3, 17, 9, 1), "contiguous"),
        ],
        3,
    ),
)
def test_odd_sizes(shape, layout, only_kernels):
    layer = make_weighing_cnx(shape[1], 3, None, torch.float32).train()
    labels = [-1, 1, -1, 0, 0, 2][: shape[0]]
    compare_cnx(layer, *make(shape, layout=layout, offset=0.1), labels)


def test_without_an_affine(only_kernels):
    layer = make_weighing_cnx(2, 4, PRIORS, torch.float32, affine=False).train()

    def oracle(x, labels, mu, log_sigma, **settings):
        one = torch.ones(2, dtype=torch.float64, device=DEVICE)
        return oracles.cnx(x, labels, one, 0 * one, mu, log_sigma, **settings)

    compare_cnx(layer, *make(SMALL, offset=0.1), [-1, 1, -1], oracle=oracle)


def test_weights_keep_the_digits_where_means_are_large(only_kernels):
    layer = make_weighing_cnx(2, 3, None, torch.float32).train()
    layer.mu.data += 500
    x, dy = make(SMALL, offset=0.1)
    compare_cnx(layer, (x.detach() + 500).requires_grad_(), dy, [-1, 1, -1], 5e-5)


def test_parameters_may_have_another_dtype(only_kernels):
    layer = make_weighing_cnx(2, 4, PRIORS, torch.bfloat16).train()
    compare_cnx(layer, *make(SMALL, torch.bfloat16, offset=0.1), [-1, 1, -1])


@pytest.mark.parametrize("labels", sampled([[-1, 1, -1], None], 1))
def test_without_gradients_and_without_some_the_rest_is_the_same(labels, only_kernels):
    layer, (x, dy) = make_weighing_cnx(2, 3, None, torch.float32).eval(), make(SMALL)
    parameters, given = list(layer.parameters()), as_labels(labels)
    y = layer(x, given)
    dx, *found = torch.autograd.grad(y, (x, *parameters), dy)
    plain = layer(x.detach(), given)  # as in the first layer of a model
    assert all(map(torch.equal, found, torch.autograd.grad(plain, parameters, dy)))
    assert torch.equal(plain, y)
    with torch.no_grad():
        assert torch.equal(layer(x, given), y)
    for p in parameters:
        p.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(layer(x, given), x, dy)[0], dx)


def test_a_converted_model_computes_what_torchs_operators_do(monkeypatch):
    monkeypatch.setenv("NORMSWAP_TRITON", "0")
    backend._works.cache_clear()
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    model = nn.Sequential(*layers).to(DEVICE)
    model = normswap.convert(model, "cn-x", contexts=3, unknown="posterior")
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    labels, (x, _), dy = as_labels([0, -1, 2, -1]), make((4, 2, 6, 6)), make((4, 3, 2, 2))[1]

    def run():
        y = model(x, context=labels)
        return y, *torch.autograd.grad(y, [x, *model.parameters()], dy)

    expected = run()
    monkeypatch.delenv("NORMSWAP_TRITON")
    backend._works.cache_clear()
    monkeypatch.delattr(cnx_layer, "apply_by_label")
    for a, b in zip(run(), expected, strict=True):
        assert_close(a, b, 1e-5)
