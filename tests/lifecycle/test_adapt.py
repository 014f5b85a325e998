"""A context's statistics from unlabelled data, against torch's own update_bn."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import normswap
from normswap import ConversionError
from normswap.graph.scope.use_context import scopes_of
from normswap.methods.layer import ContextLayer
from tests.support.builders import SKEWED, assert_close
from tests.support.models import make_inputs, make_model, same, separate

EACH = pytest.mark.parametrize("method", ["cn", "cn-x"])
NAMES = ["a", "b", "c"]


def make(method, name="ConvNet", **settings):
    base = make_model(name, torch.float64)
    settings = {"contexts": NAMES, "priors": SKEWED, **settings}
    return base, normswap.convert(base, method, **settings)


def batches_for(model, count=3):
    """Return batches of another size each, of another scale and offset than usual."""
    return [2 * make_inputs(model, 4 + i, seed=i) + 1 for i in range(count)]


@EACH
@pytest.mark.parametrize("name", ["ConvNet", "Volume", "Windows", "Opaque"])
def test_the_context_is_what_update_bn_makes_of_the_base(name, method):
    base, model = make(method, name)
    batches = batches_for(base)
    expected = copy.deepcopy(base)
    update_bn(batches, expected)
    moved = normswap.adapt(model, batches, context="b")
    plain = normswap.specialize(model, "b")
    for key, value in expected.state_dict().items():
        if "num_batches" not in key:
            assert_close(plain.state_dict()[key], value, 1e-10)
    x = make_inputs(base)
    assert_close(model(x, context="b"), expected.eval()(x), 1e-10)
    assert set(moved) == {n for n, m in model.named_modules() if isinstance(m, ContextLayer)}
    assert all(value > 1e-3 for value in moved.values())


@EACH
def test_other_contexts_parameters_modes_and_generators_stay(method):
    _, model = make(method)
    separate(model).train()
    model.neck.eval()
    x = make_inputs(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    momenta = [m.momentum for m in model.modules() if hasattr(m, "momentum")]
    state = torch.get_rng_state()
    normswap.adapt(model, batches_for(model), "c")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [m.momentum for m in model.modules() if hasattr(m, "momentum")] == momenta
    changed = ("running_mean", "running_var") if method == "cn" else ("mu", "log_sigma")
    for name, tensor in model.state_dict().items():
        if name.endswith(changed):
            assert torch.equal(tensor[:2], before[name][:2])
            assert not torch.equal(tensor[2], before[name][2])
        else:
            assert torch.equal(tensor, before[name])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(scope.lookup() is None for scope in scopes_of(model))
    model.eval()(x)


@EACH
def test_an_added_context_adapts_to_another_domain(method):
    base, model = make(method)
    x = 3 * make_inputs(base, 32) - 1
    expected = copy.deepcopy(base)
    update_bn([x], expected)
    normswap.set_unknown(model, "pooled")
    normswap.add_context(model, "night")
    normswap.adapt(model, [x], context="night")
    assert_close(model(x, context="night"), expected.eval()(x), 1e-10)
    assert_close(model(x, context="a"), base.eval()(x), 1e-10)


@EACH
def test_batches_of_every_kind(method):
    expected = None
    for wrap in (lambda x: x, lambda x: (x, 0), lambda x: [x, 0, 1], lambda x: {"x": x}):
        _, model = make(method)
        normswap.adapt(model, [wrap(x) for x in batches_for(model)], "a", batches=2)
        expected = model.state_dict() if expected is None else expected
        assert same(model.state_dict(), expected)
    _, model = make(method)
    pairs = enumerate(batches_for(model))
    normswap.adapt(model, pairs, "a", forward=lambda m, b: m(b[1]), batches=2)
    assert same(model.state_dict(), expected)


def interrupted(model):
    yield batches_for(model)[0]
    raise KeyboardInterrupt


def broken(model):
    yield batches_for(model)[0]
    yield "text"


def not_finite(model):
    x = batches_for(model)[0]
    x[0] = torch.inf
    yield x


FAILURES = [
    (interrupted, {}, KeyboardInterrupt, None),
    (broken, {}, ConversionError, "batches that are a tensor"),
    (not_finite, {}, ConversionError, "values that are not finite enter stem.1"),
    (lambda m: [], {}, ConversionError, "no batch reached .* context 'b'; the loader may be empty"),
    (lambda m: [make_inputs(m, 1)], {}, ConversionError, "more than one value .* at neck"),
    (
        batches_for,
        {"forward": lambda m, x: m(x, context="c")},
        ConversionError,
        "passes no labels, got other labels at stem.1",
    ),
    (batches_for, {"context": "d"}, normswap.UnknownNameError, "the choices are a, b, c"),
    (batches_for, {"batches": 0}, ConversionError, "batches= of at least 1, got 0"),
    (batches_for, {"context": None}, normswap.MissingContextError, "context= one of a, b, c"),
]


@EACH
@pytest.mark.parametrize(("make_loader", "arguments", "error", "match"), FAILURES)
def test_whatever_fails_leaves_the_model_as_it_was(make_loader, arguments, error, match, method):
    _, model = make(method)
    separate(model).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        normswap.adapt(model, make_loader(model), **{"context": "b", **arguments})
    assert same(model.state_dict(), before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


@EACH
def test_a_batch_of_one_counts_for_no_norm_that_sees_one_value(method):
    base, model = make(method)
    batches = batches_for(base, 2)
    _, other = make(method)
    normswap.adapt(model, [batches[0], make_inputs(base, 1), batches[1]], "a")
    normswap.adapt(other, batches, "a")
    statistic = "running_mean" if method == "cn" else "mu"
    assert_close(getattr(model.neck, statistic), getattr(other.neck, statistic))
    assert not torch.equal(getattr(model.stem[1], statistic), getattr(other.stem[1], statistic))


@EACH
def test_frozen_layers_and_a_bare_layer_adapt_too(method):
    norm = nn.BatchNorm1d(4, dtype=torch.float64).eval()
    layer = normswap.convert(norm, method, contexts=2)
    x = torch.randn(64, 4, dtype=torch.float64) * 3 + 1
    layer.requires_grad_(False)
    if method == "cn":
        layer.frozen = True
    assert set(normswap.adapt(layer, [x], 1)) == {""}
    assert_close(layer(x, context=1).mean(0), torch.zeros(4), 1e-10)
    assert_close(layer(x, context=0), norm(x), 1e-10)


@EACH
def test_compiled_and_wrapped_models_adapt(method):
    _, plain = make(method)
    normswap.adapt(plain, batches_for(plain), "a")
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        _, model = make(method)
        normswap.adapt(wrap(model), batches_for(model), "a")
        assert same(model.state_dict(), plain.state_dict())
    _, model = make(method)
    model.compile(backend="eager")
    normswap.adapt(model, batches_for(model), "a")
    assert same(model.state_dict(), plain.state_dict())
    assert model._compiled_call_impl is not None


def test_one_context_needs_no_name():
    _, model = make("cn", contexts=None, priors=None)
    assert normswap.adapt(model, batches_for(model))


def test_methods_without_statistics_of_contexts_are_refused():
    with pytest.raises(ConversionError, match=r"'acn' has no contexts to adapt .*calibrate"):
        normswap.adapt(normswap.convert(make_model(), "acn"), [])
    _, model = make("cn", "Instance")
    with pytest.raises(ConversionError, match="takes those of each instance"):
        normswap.adapt(model, [], "a")


def test_works_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    _, model = make("cn")
    assert normswap.adapt(model, batches_for(model), "a")


def test_a_norm_at_the_input_takes_the_statistics_of_the_images():
    _, model = make("cn", placement="input")
    images = 3 * torch.randn(16, *make_inputs(model).shape[1:], dtype=torch.float64) + 2
    assert list(normswap.adapt(model, [images], "b")) == ["input_norm"]
    norm = model.input_norm
    assert_close(norm.running_mean[1], images.mean((0, 2, 3)))
    assert_close(norm.running_var[1], images.transpose(0, 1).flatten(1).var(1))
    assert torch.equal(norm.running_mean[0], torch.zeros(3, dtype=torch.float64))
