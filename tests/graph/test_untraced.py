"""`trace=False`: every container runs its own forward, to the same results."""

import copy

import pytest
import torch

import normswap
from tests.support.behave import Both, check
from tests.support.builders import assert_close
from tests.support.models import MIXED, MODELS, K, convert, make_inputs, make_model, separate


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_computes_what_the_graphs_do(name, training):
    model = make_model(name, torch.float64)
    x = make_inputs(model)
    traced = separate(convert(model, "cn")).train(training)
    own = separate(convert(model, "cn", trace=False)).train(training)
    labels = MIXED.clamp(min=0)
    expected, actual = (m(x.clone().requires_grad_(), context=labels) for m in (traced, own))
    assert_close(actual, expected)
    for (_, a), (_, b) in zip(traced.named_buffers(), own.named_buffers(), strict=True):
        assert_close(b, a)


def test_the_summary_says_so():
    report = normswap.summary(convert(make_model(), "cn", trace=False))
    assert report.traced == 0
    assert report.count(delivery="scoped") == report.count(action="replaced") > 0
    assert set(report.opaque.values()) == {"was converted with trace=False"}
    assert normswap.plan(make_model(), "cn", contexts=K, trace=False).opaque == report.opaque


def test_traced_norms_are_told_from_scoped_ones():
    report = normswap.summary(convert(make_model(), "cn"))
    assert report.count(delivery="threaded") == report.count(action="replaced") > 0


def test_copies_stay_untraced():
    model = copy.deepcopy(separate(convert(make_model(), "cn", trace=False)))
    assert normswap.summary(model).traced == 0


def test_layers_inside_forwards_are_refused():
    with pytest.raises(normswap.ConversionError, match="use placement='norm'"):
        normswap.convert(make_model(), "selfnorm", placement="post", trace=False)


def test_layers_after_norms_are_not():
    model = make_model()
    x = make_inputs(model)
    converted = normswap.convert(model, "selfnorm", placement="norm", trace=False)
    assert torch.equal(converted(x), model(x))


def test_a_python_whose_bytecode_is_not_read_scopes_every_forward(monkeypatch):
    monkeypatch.setattr("normswap.graph.tracing.trace.PYTHONS", ())
    check(Both(), opaque="whose bytecode is not read")
