"""What the kernels of CN-X compute, and those of CN with them, by the interpreter or on a GPU."""

import copy

import pytest
import torch

from normswap.functional import kernels
from normswap.functional.triton import context_launches, plan
from tests.functional.triton.values import (
    CASES,
    DEVICE,
    LABELS,
    PRIORS,
    SHARE,
    as_labels,
    compare,
    compare_cn,
    make,
    make_cn,
    make_cnx,
    make_weighing,
    make_weighing_cnx,
)
from tests.support import oracles
from tests.support.builders import assert_close
from tests.support.sampling import sampled

pytestmark = pytest.mark.usefixtures("on_the_device")


def forget_cuts():
    for cut in (plan.plan_of, context_launches.forward_of, context_launches.backward_of):
        cut.cache_clear()


# Passes over x in either layout are those of all three, tables over contexts are of no layout.
TILED = [(make_cn, "channels_last"), (make_weighing, "contiguous")]
TILED += [(make_weighing_cnx, "channels_last"), (make_cn, "contiguous"), (make_cnx, "contiguous")]
TILED += [(make_cnx, "channels_last"), (make_weighing, "channels_last")]
TILED += [(make_weighing_cnx, "contiguous")]
# What starts the kernels is the same for both methods.
MAKERS = [make_cn, make_cnx, make_weighing_cnx, make_weighing]


@pytest.mark.parametrize(("maker", "layout"), sampled(TILED, 3))
def test_several_tiles_parts_and_steps(maker, layout, monkeypatch):
    monkeypatch.setattr(plan, "_TILE", 8)
    monkeypatch.setattr(plan, "_WIDTH", 2)
    monkeypatch.setattr(plan, "_PROGRAMS", 3 * 7 * (2 if layout == "channels_last" else 3))
    monkeypatch.setattr(plan, "_STEP", 2)
    monkeypatch.setattr(plan, "_COLUMNS", 2)
    forget_cuts()
    x, dy = make((7, 3, 4, 5), layout=layout)
    assert plan.plan(x).splits > 1
    layer = maker(3, 4, PRIORS, torch.float32).train()
    if maker in (make_cn, make_weighing):
        compare_cn(layer, x, dy, LABELS, unknown=layer.unknown)
    else:
        compare(layer, x, dy, LABELS, oracles.cnx, priors=PRIORS, unknown=layer.unknown)
    found = kernels.stats(x.detach())
    assert_close(found.var, x.double().flatten(2).var(2, correction=0), 1e-5)
    forget_cuts()


@pytest.mark.parametrize(
    ("dtype", "layout", "labels"),
    [*((*case, LABELS) for case in CASES), *((*case, None) for case in CASES[1:3])],
)
def test_cnx(dtype, layout, labels):
    layer = make_cnx(3, 4, PRIORS, torch.float32).eval()
    compare(layer, *make((7, 3, 5, 3), dtype, layout), labels, oracles.cnx, priors=PRIORS)


def test_cnx_without_an_affine_and_with_one_context_for_the_unknown():
    layer = make_cnx(3, 4, PRIORS, torch.float32, affine=False, unknown=3).train()

    def oracle(x, labels, mu, log_sigma):
        one = torch.ones(3, dtype=torch.float64, device=DEVICE)
        return oracles.cnx(x, labels, one, 0 * one, mu, log_sigma, PRIORS, 3)

    compare(layer, *make(), LABELS, oracle)


@pytest.mark.parametrize("maker", sampled(MAKERS, 3))
def test_one_label_for_all(maker):
    layer = maker(2, 4, PRIORS, torch.float32).eval()
    x, dy = make((3, 2, 2, 2))
    for given in (2, -1):
        found = torch.autograd.grad(layer(x, as_labels(given)), (x, *layer.parameters()), dy)
        several = layer(x, as_labels([given] * len(x)))
        expected = torch.autograd.grad(several, (x, *layer.parameters()), dy)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("maker", MAKERS)
def test_where_the_first_two_contexts_answer_for_unknown_labels(maker, training):
    layer = maker(3, 4, PRIORS, torch.float32).train(training)
    layer.answering = 2
    by_formula = copy.deepcopy(layer).double()  # float64 is for torch's operators
    x, dy = make()

    def run(layer, x, dy):
        y = layer(x, as_labels(LABELS))
        return [y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)]

    wide = run(by_formula, x.detach().double().requires_grad_(), dy.double())
    for found, expected in zip(run(layer, x, dy), wide, strict=True):
        assert_close(found, expected, SHARE[x.dtype])


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero)")
@pytest.mark.parametrize("maker", [make_cn, make_cnx])
def test_where_unknown_labels_are_an_error_their_rows_are_not_numbers(maker):
    layer = maker(3, 4, PRIORS, torch.float32, unknown="error").train()
    labels = as_labels(LABELS)
    x, dy = make()
    y = layer.normalize(x, labels, True)
    torch.autograd.grad(y, [x], dy)
    assert y[labels < 0].isnan().all()
    assert y[labels >= 0].isfinite().all()


@pytest.mark.parametrize("maker", sampled(MAKERS, 3))
def test_backward_runs_twice_and_finds_the_same_bits(maker):
    layer, (x, dy) = maker(3, 4, PRIORS, torch.float32).train(), make()
    y = layer(x, as_labels(LABELS))
    wanted = (x, *layer.parameters())
    found = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(y, wanted, dy)))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_those_of_the_formulas(maker, training):
    layer = maker(3, 4, PRIORS, torch.float32).train(training)
    labels, (x, dy) = as_labels(LABELS), make()

    def differentiate(layer, x, dy):
        wanted = [x, *layer.parameters()]
        first = torch.autograd.grad(layer(x, labels), wanted, dy, create_graph=True)
        penalty = sum((t * t).sum() for t in first)
        return *first, *torch.autograd.grad(penalty, wanted, allow_unused=True)

    found = differentiate(copy.deepcopy(layer), x, dy)
    # In float64, which these kernels leave to torch's operators.
    expected = differentiate(layer.double(), x.detach().double().requires_grad_(), dy.double())
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-5)
