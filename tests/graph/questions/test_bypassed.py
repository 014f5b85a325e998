"""Forwards that use a norm other than by calling it: right, or an error that names the norm."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import AdviceWarning, ConversionError, VerificationError


class Tuned(nn.BatchNorm2d):
    def normalize(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var)

    def double(self, x):
        return 2 * self(x)


def use_helper(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var)


def use_alias(m, x):
    norm = m.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


FAILING = {
    "own method": lambda m, x: m.norm.normalize(x),
    "own method that calls it": lambda m, x: m.norm.double(x),
    "unbound forward": lambda m, x: nn.BatchNorm2d.forward(m.norm, x),
    "inherited forward": lambda m, x: super(Tuned, m.norm).forward(x),
    "functional": lambda m, x: F.batch_norm(x, m.norm.running_mean, m.norm.running_var),
    "alias": use_alias,
    "helper": lambda m, x: use_helper(x, m.norm),
    "getattr": lambda m, x: F.instance_norm(x, weight=getattr(m.norm, "weight")),  # noqa: B009
    "list": lambda m, x: F.batch_norm(x, m.norms[0].running_mean, m.norms[0].running_var),
    "operator": lambda m, x: torch.batch_norm(
        x, None, None, m.norm.running_mean, m.norm.running_var, False, 0.1, 1e-5, False
    ),
    "by hand": lambda m, x: x * m.norm.weight.view(1, -1, 1, 1),
    "state dict": lambda m, x: F.instance_norm(x, weight=m.norm.state_dict()["weight"]),
}
OTHER_VALUES = {
    "penalty": lambda m, x: m.norm(x) + m.norm.weight.abs().sum(),
    "parameters": lambda m, x: m.norm(x) + sum(p.sum() for p in m.norm.parameters()),
    "shape": lambda m, x: m.norm(x) * m.norm.weight.shape[0],
}
# No comparison right after conversion tells.
SILENT = {
    "statistics": lambda m, x: m.norm(x) - m.norm.running_mean.mean(),
    "written to": lambda m, x: (m.norm.weight.data.clamp_(min=0.1), m.norm(x))[1],
}
RIGHT = {
    "input check": lambda m, x: (m.norm._check_input_dim(x), m.norm(x))[1],
    "bound forward": lambda m, x: m.norm.forward(x),
    "dtype": lambda m, x: m.norm(x.to(m.norm.weight.dtype)),
    "settings": lambda m, x: m.norm(x) * m.norm.num_features + m.norm.eps,
}
X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2])
TRACE = pytest.mark.parametrize("trace", [True, False])


def make(forward):
    """Make a model with a forward of (model, x)."""
    model = type("Using", (nn.Module,), {"forward": forward})()
    model.stem, model.norm = nn.BatchNorm2d(4), Tuned(4)
    model.norms = nn.ModuleList([nn.BatchNorm2d(4)])
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    model.norm.running_mean.normal_()
    return model.eval()


def convert(model, **given):
    return normswap.convert(model, "cn", contexts=3, **given)


@TRACE
@pytest.mark.parametrize("use", FAILING.values(), ids=FAILING)
def test_what_fails_is_named_at_conversion(use, trace):
    with pytest.raises(ConversionError, match=r"norms?\.0?.*exclude='norms?"):
        convert(make(use), trace=trace, example_inputs=X)


@TRACE
@pytest.mark.parametrize("use", FAILING.values(), ids=FAILING)
def test_what_fails_is_named_in_the_first_forward(use, trace):
    model = convert(make(use), trace=trace, verify=False)
    for training in (False, True):
        with pytest.raises(ConversionError, match=r"exclude='norms?"):
            model.train(training)(X, context=LABELS)


@pytest.mark.parametrize("use", FAILING.values(), ids=FAILING)
def test_the_way_out_keeps_the_norm(use):
    model = make(use)
    converted = convert(model, exclude="norm*", example_inputs=X)
    torch.testing.assert_close(converted(X), model(X))


@TRACE
@pytest.mark.parametrize("use", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_what_computes_something_else_is_named(use, trace):
    with pytest.raises(VerificationError, match=r"take norm\..*exclude='norm'"):
        convert(make(use), trace=trace, example_inputs=X)


@TRACE
@pytest.mark.parametrize("use", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_the_summary_says_what_is_read(use, trace):
    assert normswap.summary(convert(make(use), trace=trace, verify=False)).norm_reads


@pytest.mark.parametrize("use", [*OTHER_VALUES.values(), *SILENT.values()])
def test_what_forwards_read_is_warned_of(use):
    with pytest.warns(AdviceWarning, match=r"norm\..*exclude='norm'"):
        convert(make(use), verify=False)


@TRACE
@pytest.mark.parametrize("use", RIGHT.values(), ids=RIGHT)
def test_calls_and_settings_are_right(use, trace):
    model = make(use)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "forwards take")
        converted = convert(copy.deepcopy(model), trace=trace, example_inputs=X)
    torch.testing.assert_close(converted(X, context=LABELS), model(X))
    assert not normswap.summary(converted).norm_reads


@pytest.mark.parametrize("use", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_a_recomputation_that_ends_early_is_no_error(use):
    model = convert(make(use), verify=False)
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@TRACE
def test_errors_with_another_cause_stay(trace):
    model = convert(make(lambda m, x: m.norm(x) @ x.new_ones(7, 7)), trace=trace, verify=False)
    with pytest.raises(RuntimeError, match="shape") as found:
        model(X, context=LABELS)
    assert not isinstance(found.value, ConversionError)


LACKING = {
    "running_var": lambda m, x: m.norm(x) * (2 if hasattr(m.norm, "running_var") else 3),
    "running_mean": lambda m, x: m.norm(x) * (getattr(m.norm, "running_mean", None) is None),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_question_for_what_a_layer_lacks_is_warned_of(name):
    with pytest.warns(AdviceWarning, match=rf"norm\.{name}.*exclude='norm'"):
        normswap.convert(make(LACKING[name]), "cn-x", contexts=3, verify=False)
