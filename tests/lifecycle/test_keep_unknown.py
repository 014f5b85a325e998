"""With `keep_unknown`, samples without a label know nothing of a context that is added."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import normswap
from normswap import ConversionError
from normswap.methods.layer import ContextLayer
from tests.support import oracles
from tests.support.builders import assert_close, make_batch, trained_norm
from tests.support.models import make_inputs, make_model, separate
from tests.support.more_contexts import KINDS, POLICIES
from tests.support.saved import describe, rewrite

UNKNOWN = torch.full((6,), -1)
MIXED = torch.tensor([0, 1, -1, 0, 1, -1])


def make(unknown, name="ConvNet", **settings):
    base = make_model(name, torch.float64)
    settings = {"contexts": ["a", "b"], "priors": [0.7, 0.3], "unknown": unknown, **settings}
    return base, separate(normswap.convert(base, **settings)).eval()


def add(model, name="c", **settings):
    """Add a context and move it far away, as training may."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = normswap.add_context(model, name, like="a", keep_unknown=True, **settings)
    with torch.no_grad():
        for layer in model.modules():
            for key, table in layer.state_dict().items() if isinstance(layer, ContextLayer) else ():
                if table.dim() == 2 and len(table) == index + 1:
                    assert key != "priors"
                    table[index] += 0.5
    return model


@POLICIES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_answers_without_a_label_stay(kind, unknown, training):
    _, model = make(unknown, **KINDS[kind])
    x = make_inputs(model)
    before = copy.deepcopy(model)
    add(add(model, share=0.6), "d")
    model.train(training), before.train(training)
    assert_close(model(x, context=MIXED), before(x, context=MIXED))
    assert_close(model.eval()(x), before.eval()(x))
    assert not torch.allclose(model(x, context="c"), before(x, context="a"))


@POLICIES
def test_they_are_those_of_the_loop_over_the_contexts_before(unknown):
    base = nn.Sequential(trained_norm().double())
    x, labels = make_batch((6, 4, 3, 5)), [-1] * 6
    for method in ("cn", "cn-x"):
        given = {"contexts": ["a", "b"], "priors": [0.7, 0.3], "unknown": unknown}
        layer = add(separate(normswap.convert(base, method, **given)))[0]
        if method == "cn":
            running = oracles.Running(layer.running_mean[:2], layer.running_var[:2], [1, 1])
            tables = layer.weight[:2], layer.bias[:2], running
            expected = oracles.cn(x, labels, *tables, [0.7, 0.3], layer.eps, unknown)
        else:
            tables = layer.weight, layer.bias, layer.mu[:2], layer.log_sigma[:2]
            expected = oracles.cnx(x, labels, *tables, [0.7, 0.3], unknown)
        assert_close(layer.eval()(x), expected)


@POLICIES
def test_copies_compiled_and_saved_models_keep_them(unknown, tmp_path):
    base, model = make(unknown, method="cn")
    x = make_inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(x)
    assert_close(compiled(x, context=UNKNOWN), expected)
    add(compiled)
    assert_close(compiled(x, context=UNKNOWN), expected)
    normswap.save(model, tmp_path)
    loaded = normswap.load(base, tmp_path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(x), model(x))
        assert_close(add(twin, "d")(x), expected)
        assert "unknown labels: " + unknown + " of a, b\n" in str(normswap.summary(twin))


def test_pooled_means_the_same_wherever_it_is_named():
    _, model = make("pooled", method="cn")
    x = make_inputs(model)
    expected = model(x)
    add(model)
    assert_close(normswap.specialize(model, "pooled")(x), expected)
    normswap.add_context(model, "d", like="pooled")
    assert_close(model(x, context="d"), expected)


@POLICIES
def test_set_unknown_lets_them_look_at_all_contexts(unknown):
    _, model = make(unknown, method="cn")
    twin, x = copy.deepcopy(model), make_inputs(model)
    add(model)
    normswap.set_unknown(model, unknown)
    with pytest.warns(normswap.ContextWarning, match=r"keep_unknown=True\) keeps them"):
        normswap.add_context(twin, "c", like="a")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(x), twin(x))
    assert normswap.summary(model).unknown == unknown


def test_a_folder_of_an_older_format_lets_all_contexts_answer(tmp_path):
    base, model = make("pooled", method="cn")
    normswap.save(model, tmp_path)
    assert describe(tmp_path)["answering"] is None
    rewrite(tmp_path, format=2, answering="anything")
    assert torch.equal(normswap.load(base, tmp_path)(make_inputs(base)), model(make_inputs(base)))


def test_a_flag_that_is_no_bool_changes_nothing():
    _, model = make("pooled", method="cn")
    with pytest.raises(ConversionError, match="expected keep_unknown= as True or False, got 'yes'"):
        normswap.add_context(model, "c", keep_unknown="yes")
    assert normswap.summary(model).contexts == ("a", "b")
