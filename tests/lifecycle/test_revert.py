"""A reverted model is the one that was converted."""

import copy

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError
from tests.support.builders import assert_close, make_batch, trained_norm
from tests.support.models import same, separate
from tests.support.reverted import EACH, EVERY_NORM, make


@EACH
@EVERY_NORM
def test_every_class_of_norm_comes_back_to_the_bit(kind, method):
    base, model = make(kind, method)
    norm = normswap.revert(model)[1]
    assert type(norm) is type(base[1])
    assert same(norm.state_dict(), base[1].state_dict())
    assert str(norm) == str(base[1])
    assert vars(norm).keys() == vars(base[1]).keys()
    plain = ("eps", "momentum", "note", "names", "process_group", "affine", "training")
    for name in plain:
        assert getattr(norm, name, None) == getattr(base[1], name, None)
    assert [n for n, _ in norm.named_buffers()] == [n for n, _ in base[1].named_buffers()]
    assert [n for n, _ in norm.named_modules()] == [n for n, _ in base[1].named_modules()]


@EACH
def test_hooks_freezing_and_modes_are_those_of_now(method):
    _, model = make("BatchNorm2d", method)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[1].bias.requires_grad_(False)
    model.train()
    model[1].eval()
    back = normswap.revert(model)
    assert [back.training, back[1].training] == [True, False]
    assert [p.requires_grad for p in back[1].parameters()] == [True, False]
    back(torch.randn(2, 3, 4, 4))
    assert calls == [1]


@EACH
def test_a_momentum_and_an_attribute_set_after_conversion_are_kept(method):
    _, model = make("subclass", method)
    model[1].note = "new"
    model[1].eps = 0.5
    norm = normswap.revert(model)[1]
    assert [norm.note, norm.names, norm.eps] == ["new", "not those of contexts", 0.5]


@EACH
def test_device_and_dtype_are_those_of_now(method):
    base, model = make("BatchNorm2d", method)
    back = normswap.revert(model.to(torch.bfloat16))
    expected = copy.deepcopy(base).to(torch.bfloat16)
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == expected.state_dict()[name].dtype
        bound = 3 * torch.finfo(torch.bfloat16).eps
        assert torch.allclose(tensor.double(), expected.state_dict()[name].double(), rtol=bound)


class Shared(nn.Module):
    """One norm under two names, in a list and in a dict."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.again = self.first
        self.__dict__["other"] = self.first
        self.__dict__["held"] = [self.first]
        self.__dict__["named"] = {"it": self.first}

    def forward(self, x):
        return self.other(self.again(self.first(x)))


@EACH
def test_aliases_lists_and_dicts_hold_the_norm_again(method):
    model = normswap.convert(Shared().eval(), method, contexts=2, verify=False)
    assert model.first is model.other is model.again is model.held[0] is model.named["it"]
    separate(model.double())
    x, labels = make_batch((4, 3, 2, 2)), torch.tensor([0, 1, 1, 0])
    layer = model.first
    expected = layer(layer(layer(x, labels), labels), labels)
    assert_close(model(x, context=labels), expected)
    back = normswap.revert(model, 0)
    assert type(back.first) is nn.BatchNorm2d
    assert back.first is back.other is back.again is back.held[0] is back.named["it"]


@EACH
def test_a_bare_norm_comes_back(method):
    norm = trained_norm()
    layer = normswap.convert(norm, method, contexts=2)
    for inplace in (False, True):
        back = normswap.revert(layer, inplace=inplace)
        assert type(back) is nn.BatchNorm2d
        assert same(back.state_dict(), norm.state_dict())


@EACH
def test_a_replaced_forward_and_a_slice_come_back(method):
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    original = base.forward
    base.forward = lambda x: original(x) * 2
    model = normswap.convert(base, method, contexts=2, verify=False, inplace=True)
    model.part = nn.ModuleList([model[:2]])
    normswap.revert(model, inplace=True)
    assert type(model) is nn.Sequential
    assert type(model.part[0]) is nn.Sequential
    assert "forward" in vars(model)


@EACH
def test_contexts_that_agree_to_rounding_need_no_name(method):
    _, model = make("BatchNorm2d", method)
    with torch.no_grad():
        for table in (model[1].weight, model[1].bias):
            table.mul_(1.5)
    back = normswap.revert(model)
    x = torch.randn(4, 3, 5, 5)
    assert torch.allclose(back(x), model(x, context="b"), rtol=1e-5, atol=1e-6)


@EACH
def test_the_policy_posterior_is_refused_and_pooled_is_not_ambiguous(method):
    base, model = make("BatchNorm2d", method)
    with pytest.raises(ConversionError, match="'posterior' weighs the contexts by each input"):
        normswap.specialize(model, "posterior")
    model = normswap.convert(base, method, contexts=["pooled", "other"], unknown="error")
    with pytest.raises(ConversionError, match="pass the index 0"):
        normswap.specialize(model, "pooled")
    assert type(normswap.specialize(model, 0)[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("context", "error", "match"),
    [
        ("d", normswap.UnknownNameError, "unknown context 'd'; the choices are a, b, c"),
        (3, normswap.ContextError, r"in \[0, 3\), got 3"),
        (True, normswap.ContextError, "by name or index, got True"),
        (None, ConversionError, "context= one of 'a', 'b', 'c', 'pooled', got none"),
    ],
)
def test_contexts_that_are_none(context, error, match):
    with pytest.raises(error, match=match):
        normswap.specialize(make("BatchNorm2d", "cn")[1], context)


def test_what_is_no_converted_model():
    base, model = make("BatchNorm2d", "cn")
    for function in (normswap.revert, normswap.specialize):
        with pytest.raises(ConversionError, match="expected a converted model, got Sequential; ca"):
            function(base)
        with pytest.raises(ConversionError, match=r"which holds one: pass its \.0"):
            function(nn.Sequential(model))
    with pytest.raises(ConversionError, match="got int"):
        normswap.revert(3)
    with pytest.raises(ConversionError, match="got both"):
        normswap.revert(model, "a", discard=True)
    back = normswap.revert(model)
    with pytest.raises(ConversionError, match="expected a converted model"):
        normswap.revert(back)


def test_a_wrapped_model_is_found():
    _, model = make("BatchNorm2d", "cn")
    compiled = torch.compile(model, backend="eager")
    assert type(normswap.revert(compiled)) is nn.Sequential
    assert type(normswap.revert(nn.DataParallel(model))) is nn.Sequential


def test_a_failed_reversion_changes_nothing():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    model = normswap.convert(base, "acn")
    with torch.no_grad():
        model[2].running_mean[0] += 1
    x = torch.randn(2, 3, 4, 4)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(
        ConversionError, match=r"cannot revert 2 \(AdaptiveContextNorm\): its map de"
    ):
        normswap.revert(model, inplace=True)
    assert same(model.state_dict(), before)
    assert torch.equal(model(x), expected)
    model.held = (model[1],)
    with pytest.raises(ConversionError, match="in a tuple"):
        normswap.revert(model, discard=True, inplace=True)
    assert same(model.state_dict(), before)
    assert torch.equal(model(x), expected)


def test_nothing_of_the_conversion_is_left_on_the_model():
    model = timm.create_model("resnet10t", num_classes=2)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    reverted = normswap.revert(normswap.convert(model, "cn", contexts=2, verify=False))
    assert {name: set(vars(module)) for name, module in reverted.named_modules()} == before
