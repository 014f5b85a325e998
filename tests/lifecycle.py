"""What every method promises after conversion; subclass `Lifecycle` with a parameter `method`."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap.lifecycle.record import method_layers
from normswap.methods.base import get_method
from tests.builders import SKEWED, assert_close, random_
from tests.models import MODELS, make_inputs, make_model

# In eval, what a trained layer of these computes depends on the input: no plain norm equals it.
INPUT_DEPENDENT = {"acn", "cnsn", "selfnorm"}
NAMES = ["a", "b", "c"]
LABELS = torch.tensor([2, 0, 1, 0, 1, 2])


def settings_of(method):
    if get_method(method).needs_context:
        return {"contexts": NAMES, "priors": SKEWED}
    return {}


def make(method, name="ConvNet", dtype=torch.float64):
    """Return a model in eval mode and its conversion."""
    if method == "acn" and name == "Instance":
        pytest.skip("refused: acn shares statistics between instances")
    base = make_model(name, dtype)
    return base, normswap.convert(base, method, **settings_of(method))


def train(model, seed=0):
    """Move every tensor of the method's layers by a random amount."""
    for layer in method_layers(model).values():
        for name, tensor in sorted(layer.state_dict().items()):
            if tensor.is_floating_point() and name != "priors":
                seed += 1
                with torch.no_grad():
                    tensor.add_(random_(torch.empty_like(tensor), seed, 0.1, 0.7))
    return model


def run(model, x, label=None):
    extra = {} if label is None else {"context": label}
    with torch.no_grad():
        return model.eval()(x, **extra)


def labels_of(method):
    return [0, 1, 2, LABELS, None] if get_method(method).needs_context else [None]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Lifecycle:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", MODELS)
    def test_reverted_at_once_it_is_the_original_to_the_bit(self, method, name, dtype):
        base, model = make(method, name, dtype)
        back = normswap.revert(model)
        assert same(back.state_dict(), base.state_dict())
        pairs = list(zip(base.named_modules(), back.named_modules(), strict=True))
        assert all(m == n and type(a) is type(b) for (m, a), (n, b) in pairs)
        assert all(vars(a).keys() == vars(b).keys() for (_, a), (_, b) in pairs)
        x = make_inputs(base)
        assert torch.equal(run(back, x), run(base, x))
        assert "context" not in str(back.forward.__doc__)

    def test_reverting_leaves_the_converted_model_alone_unless_inplace(self, method):
        base, model = make(method)
        before = copy.deepcopy(model.state_dict())
        normswap.revert(model)
        assert same(model.state_dict(), before)
        assert normswap.revert(model, inplace=True) is model
        assert type(model) is type(base)

    def test_copies_and_pickles_revert_too(self, method):
        base, model = make(method)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(normswap.revert(twin).state_dict(), base.state_dict())

    def test_reverted_model_converts_and_reverts_again(self, method):
        base, model = make(method)
        again = normswap.convert(normswap.revert(model), method, **settings_of(method))
        assert again.state_dict().keys() == model.state_dict().keys()
        assert same(normswap.revert(again).state_dict(), base.state_dict())

    @pytest.mark.parametrize("name", MODELS)
    def test_specialised_model_computes_each_context_in_plain_norms(self, method, name):
        base, model = make(method, name)
        train(model)
        x = make_inputs(base)
        contextual = get_method(method).needs_context
        if method in INPUT_DEPENDENT:
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(normswap.ConversionError, match=r"depends on|scales each channel"):
                normswap.specialize(model, inplace=True)
            assert same(model.state_dict(), before)
            return
        for context in [*NAMES, "pooled"] if contextual else [None]:
            plain = normswap.specialize(model, context)
            assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
            label = None if context == "pooled" else context
            assert_close(run(plain, x), run(model, x, label))

    def test_reverting_asks_which_context_once_they_differ(self, method):
        _, model = make(method)
        train(model)
        if not get_method(method).needs_context:
            with pytest.raises(normswap.ConversionError, match="has no contexts"):
                normswap.revert(model, "b")
            return
        with pytest.raises(normswap.ConversionError, match=r"context= one of 'a', 'b', 'c', 'pool"):
            normswap.revert(model)
        x = make_inputs(make_model())
        back = normswap.revert(model, "b")
        assert_close(run(back, x.double()), run(model, x.double(), "b"))

    def test_discarding_gives_the_norms_of_the_conversion(self, method):
        base, model = make(method)
        train(model)
        assert same(normswap.revert(model, discard=True).state_dict(), base.state_dict())

    def test_other_weights_stay_trained(self, method):
        _, model = make(method)
        with torch.no_grad():
            model.head.weight.fill_(3)
        assert bool((normswap.revert(model).head.weight == 3).all())

    @pytest.mark.parametrize("name", MODELS)
    def test_saved_and_loaded_it_is_the_same_to_the_bit(self, method, name, tmp_path):
        base, model = make(method, name)
        train(model)
        normswap.save(model, tmp_path)
        twin = normswap.load(base, tmp_path)
        assert same(twin.state_dict(), model.state_dict())
        x = make_inputs(base)
        for label in labels_of(method):
            assert torch.equal(run(twin, x, label), run(model, x, label))
        assert type(base) is MODELS[name]
        normswap.save(twin, tmp_path / "again")
        assert same(normswap.load(base, tmp_path / "again").state_dict(), model.state_dict())

    def test_whole_state_dict_goes_round(self, method):
        base, model = make(method)
        train(model)
        twin = normswap.convert(base, method, **settings_of(method))
        twin.load_state_dict(model.state_dict())
        assert same(twin.state_dict(), model.state_dict())

    def test_checkpoint_of_the_base_loads_and_restores_its_function(self, method):
        base, model = make(method)
        train(model)
        if method in ("cnsn", "selfnorm"):
            model = normswap.convert(make_model(dtype=torch.float64), method)
        model.load_state_dict(base.state_dict())
        x = make_inputs(base)
        for label in labels_of(method):
            assert_close(run(model, x, label), run(base, x))

    @pytest.mark.filterwarnings("ignore:samples without a label are now answered")
    def test_an_added_context_computes_what_it_is_like_and_moves_nothing(self, method):
        _, model = make(method)
        train(model)
        if not get_method(method).needs_context:
            with pytest.raises(normswap.ConversionError, match="has no contexts to add to"):
                normswap.add_context(model, "d")
            return
        x = make_inputs(model)
        before = [run(model, x, label) for label in (0, 1, 2, LABELS)]
        unknown = run(model, x)
        assert normswap.add_context(model, "d") == 3
        assert normswap.add_context(model, "e", like="b", share=0.1) == 4
        for label, expected in zip((0, 1, 2, LABELS), before, strict=True):
            assert torch.equal(run(model, x, label), expected)
        assert_close(run(model, x, "d"), unknown)
        assert_close(run(model, x, "e"), before[1])

    def test_a_context_is_added_whole_or_not_at_all(self, method):
        _, model = make(method)
        before = copy.deepcopy(model.state_dict())
        stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        with pytest.raises(normswap.NormswapError):
            normswap.add_context(model, "d", optimizer=stranger)
        assert same(model.state_dict(), before)
        if get_method(method).needs_context:
            assert normswap.summary(model).contexts == tuple(NAMES)
