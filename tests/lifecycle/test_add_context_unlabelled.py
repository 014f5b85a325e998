"""What `add_context` says of samples without a label, whose answers it may change."""

import warnings

import pytest
import torch

import normswap
from normswap import ContextWarning
from tests.support.models import make_inputs, make_model

CHANGES = [
    ("pooled", "a", True),
    ("pooled", "pooled", False),
    ("posterior", "pooled", True),
    ("b", "a", False),
]


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize(("policy", "like", "changes"), CHANGES)
def test_a_warning_says_that_answers_without_a_label_change(method, policy, like, changes):
    base = make_model(dtype=torch.float64)
    model = normswap.convert(base, method, contexts=["a", "b"], unknown=policy).eval()
    x = 3 * make_inputs(base) + 1
    normswap.adapt(model, [x], "a", progress=False)
    before = model(x)
    if changes:
        text = "answered by context 'c' too, for a share of 0.3"
        with pytest.warns(ContextWarning, match=text) as warned:
            normswap.add_context(model, "c", like=like)
        assert warned[0].filename == __file__
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            normswap.add_context(model, "c", like=like)
    apart = float((model(x) - before).detach().abs().max())
    assert (apart > 1e-3) == changes


def test_one_context_alone_has_nothing_to_warn_of():
    model = normswap.convert(make_model(), "cn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.add_context(model, "b", like=0)


def test_what_an_optimizer_keeps_on_a_parameter_follows():
    """As timm's AdaHessian keeps its traces."""
    model = normswap.convert(make_model(), "cn", contexts=["a", "b"], unknown="a")
    where, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "num_contexts"))
    layer.weight.hess, layer.weight.tag = torch.rand_like(layer.weight), "kept"
    before = layer.weight.hess.clone()
    normswap.add_context(model, "c", like="b")
    weight = model.get_submodule(where).weight
    torch.testing.assert_close(weight.hess, torch.cat([before, before[1:]]))
    assert weight.tag == "kept"
    normswap.remove_context(model, "c")
    assert torch.equal(model.get_submodule(where).weight.hess, before)
