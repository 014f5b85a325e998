"""A method of a user's own whose `build` returns a plain module: what the framework adds."""

from dataclasses import dataclass

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

import normswap
from normswap.methods.base import Method
from normswap.methods.layer import ContextLayer
from normswap.methods.registry import _REGISTRY


@dataclass(frozen=True)
class GroupOptions:
    groups: int = 2


class Groups(Method):
    name = "test-groups"
    title = "group norm"
    options = GroupOptions
    needs_context = False
    keeps_function = False
    input_dependent = True

    def build(self, site, source, contexts, options):
        return nn.GroupNorm(options.groups, site.num_features, site.eps)


class Centre(nn.Module):
    """Has statistics that move in training, and knows no setting that stops them."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.5)
        return x - self.running_mean[:, None, None]


class Centres(Groups):
    name = "test-centres"

    def build(self, site, source, contexts, options):
        return Centre(site.num_features)


class Scale(ContextLayer):
    context_parameters = ("weight", "bias")

    def __init__(self, channels, contexts):
        super().__init__(channels, contexts.count, contexts.unknown)
        self.weight = nn.Parameter(torch.ones(contexts.count, channels))
        self.bias = nn.Parameter(torch.zeros(contexts.count, channels))

    def normalize(self, x, labels, unlabelled):
        return x


class Scales(Groups):
    name = "test-scales"
    needs_context = True

    def build(self, site, source, contexts, options):
        return Scale(site.num_features, contexts)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    for method in (Groups, Centres, Scales):
        normswap.register_method(method)
    yield
    for method in (Groups, Centres, Scales):
        del _REGISTRY[method.name]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


def convert(model, **settings):
    return normswap.convert(model, "test-groups", **settings)


def images():
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def expected(model, x):
    return F.group_norm(F.silu(F.group_norm(model.conv(x), 2)), 2)


def test_fused_activation_and_drop_are_applied():
    model = convert(Net().eval())
    x = images()
    assert type(model.norm) is nn.GroupNorm
    torch.testing.assert_close(model(x), expected(model, x))
    model.train()
    assert not torch.equal(model(x), model(x))  # the dropout


def test_mode_hooks_freezing_and_attributes_are_carried_over():
    base = Net().train()
    base.norm.eval()
    base.norm.weight.requires_grad_(False)
    base.last.requires_grad_(False)
    base.last.mine = "kept"
    seen = []
    handle = base.last.register_forward_hook(lambda *given: seen.append(given[2].shape))
    model = convert(base, inplace=True)
    assert [model.training, model.norm.training, model.last.training] == [True, False, True]
    grads = {n: p.requires_grad for n, p in model.named_parameters() if "conv" not in n}
    assert grads == dict.fromkeys(grads, False) | {"norm.bias": True}
    assert model.last.mine == "kept"
    assert model.last.num_features == 4
    model(images())
    assert seen == [(3, 4, 5, 5)]
    handle.remove()
    model(images())
    assert len(seen) == 1


def test_an_error_of_build_names_the_norm():
    base = Net()
    with pytest.raises(normswap.ConversionError, match="'norm', a BatchNormAct2d: ValueError") as e:
        convert(base, groups=3, inplace=True)
    assert isinstance(e.value.__cause__, ValueError)
    assert isinstance(base.norm, BatchNormAct2d)


def test_frozen_statistics_stay_in_a_layer_that_does_not_know_of_it():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = normswap.convert(base, "test-centres").train()
    normswap.freeze(model, "all", stats="frozen")
    assert torch.equal(model.train()(images()), base[0](images()))
    normswap.freeze(model, "all")
    assert not torch.equal(model(images()), base[0](images()))


def test_entries_of_a_base_go_to_every_context():
    base = nn.Sequential(nn.BatchNorm2d(3))
    model = normswap.convert(base, "test-scales", contexts=2)
    nn.init.normal_(base[0].weight)
    model.load_state_dict(base.state_dict())
    assert torch.equal(model[0].weight, base[0].weight.expand(2, 3))


def test_state_dict_keys_are_those_of_the_layer():
    model = convert(Net())
    assert {k for k in model.state_dict() if "conv" not in k} == {
        *("norm.weight", "norm.bias", "last.weight", "last.bias")
    }


def test_it_sits_where_the_norm_was_in_its_dtype():
    assert convert(Net().double()).norm.weight.dtype == torch.float64
    with torch.device("meta"):
        model = Net()
    assert convert(model).norm.weight.is_meta


def test_it_reverts_to_the_bit_and_says_when_no_norm_equals_it():
    base = Net().eval()
    model = convert(base)
    back = normswap.revert(model)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in back.state_dict().items())
    assert torch.equal(back(images()), base(images()))
    model.last.bias.data += 1
    with pytest.raises(normswap.ConversionError, match="equals no plain norm"):
        normswap.revert(model)
    assert torch.equal(normswap.revert(model, discard=True)(images()), base(images()))


def test_that_it_does_not_keep_the_function_is_said():
    base = Net().eval()
    model = convert(base, example_inputs=images())
    said = normswap.summary(model)
    assert "does not keep the function: largest output difference" in str(said)
    difference = float((model(images()) - base(images())).abs().max().detach())
    assert said.verification.largest == pytest.approx(difference)
    assert normswap.verify(model, base, images()).largest == pytest.approx(difference)
    assert [row.target for row in said.rows] == ["GroupNorm", "GroupNorm"]


def test_outputs_that_are_not_finite_are_an_error_still():
    base = Net().eval()
    model = convert(base)
    model.last.bias.data.fill_(torch.nan)
    with pytest.raises(normswap.VerificationError, match=r"and \d+ that were finite are not;"):
        normswap.verify(model, base, images())


def test_it_is_trained_and_frozen_as_a_norm():
    model = convert(Net())
    normswap.freeze(model, "norms")
    assert not model.conv.weight.requires_grad
    assert model.norm.weight.requires_grad
    groups = normswap.param_groups(convert(Net()), 0.1, weight_decay=0.01)
    assert {g["weight_decay"]: len(g["params"]) for g in groups} == {0.01: 1, 0.0: 5}


@pytest.mark.parametrize(
    ("result", "labels", "match"),
    [
        (None, False, "to return a new module for 'norm', got None"),
        ("source", False, "got the norm itself"),
        (nn.Identity(), True, "expected a subclass of ContextLayer .* got Identity"),
    ],
)
def test_what_build_must_not_return(monkeypatch, result, labels, match):
    def build(self, site, source, contexts, options):
        return source if result == "source" else result

    monkeypatch.setattr(Groups, "build", build)
    monkeypatch.setattr(Groups, "needs_context", labels)
    with pytest.raises(normswap.ConversionError, match=match):
        convert(Net())
