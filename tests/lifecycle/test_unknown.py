import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap import ConversionError, UnknownNameError
from tests.support.models import ConvNet


def trained(method: str, unknown: str = "pooled") -> nn.Module:
    """A converted model whose contexts are far apart; the same for every policy."""
    torch.manual_seed(0)
    model = normswap.convert(ConvNet(), method, contexts=["a", "b", "c"], unknown=unknown)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 2 and value.shape[0] == 3:
                value.add_(torch.rand(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_a_policy_chosen_later_is_the_policy_converted_with(method):
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = trained(method)
    outputs = []
    for policy in ("posterior", "b", "pooled", "c"):
        normswap.set_unknown(model, policy)
        outputs.append(model(x))
        torch.testing.assert_close(outputs[-1], trained(method, policy)(x), rtol=0, atol=0)
        assert f"unknown labels: {policy}" in str(normswap.summary(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), outputs[-1])
    torch.testing.assert_close(outputs[1], model(x, context="b"))
    for i, one in enumerate(outputs):
        assert not any(torch.allclose(one, other) for other in outputs[:i])


def test_labels_are_refused_or_taken_as_the_policy_says():
    model = trained("cn-x")
    x = torch.randn(2, 3, 16, 16)
    normswap.set_unknown(model, "error")
    with pytest.raises(normswap.MissingContextError):
        model(x)
    normswap.set_unknown(model, "pooled")
    model(x)


def test_saved_models_keep_the_policy(tmp_path):
    model = trained("cn")
    normswap.set_unknown(model, "posterior")
    normswap.save(model, tmp_path / "saved")
    torch.manual_seed(0)
    loaded = normswap.load(ConvNet(), tmp_path / "saved").eval()

    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))


def test_what_is_no_policy_leaves_the_model_as_it_was():
    model = trained("cn")
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    with pytest.raises(UnknownNameError, match=r"choices are error, pooled, posterior, a, b, c"):
        normswap.set_unknown(model, "d")
    assert torch.equal(model(x), before)


def test_only_models_with_contexts_have_a_policy():
    with pytest.raises(ConversionError, match=r"call normswap\.convert first"):
        normswap.set_unknown(ConvNet(), "pooled")
    with pytest.raises(ConversionError, match="got 'selfnorm'"):
        normswap.set_unknown(normswap.convert(ConvNet(), "selfnorm", placement="norm"), "pooled")
