"""Parameter groups: which parameters decay, and at which rate each trains."""

import copy
import pickle

import pytest
import timm
import timm.optim
import torch
from torch import nn

import normswap
from tests.support.models import ConvNet
from tests.support.training import METHODS, convert


def decayed(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}


def conv_and_head_weights(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("method", METHODS)
def test_decay_spares_norms_and_biases_only(method):
    model = convert(ConvNet(), method)
    groups = normswap.param_groups(model, lr=0.1, weight_decay=0.05)
    assert decayed(model, groups) == conv_and_head_weights(model)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("method", METHODS)
def test_timms_own_factory_spares_the_same(method, layer_decay):
    model = convert(timm.create_model("resnet10t"), method)
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=layer_decay
    )
    assert decayed(model, optimizer.param_groups) == conv_and_head_weights(model)


def test_what_a_model_exempts_stays_exempt():
    model = timm.create_model("levit_conv_128s", num_classes=3)
    own = set(model.no_weight_decay())
    converted = convert(model, "cn")
    assert own
    assert own < set(converted.no_weight_decay())
    assert not own & decayed(converted, normswap.param_groups(converted, 0.1, 0.05))


def test_exemptions_follow_copies_and_pickles():
    model = convert(ConvNet(), "cn")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del other.neck
        gone = model.no_weight_decay() - other.no_weight_decay()
        wanted = {"neck.weight", "neck.bias"}
        assert {name for name in gone if not name.startswith("_orig_mod")} == wanted


def test_norms_have_a_rate_of_their_own():
    model = convert(ConvNet(), "cn-x")
    model.neck = nn.LayerNorm(4)
    groups = normswap.param_groups(model, lr=0.1, norm_lr=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    fast = {names[id(p)] for g in groups if g["lr"] == 0.5 for p in g["params"]}
    norms = {n for n in names.values() if ".bn." in n or n.startswith(("stem.1", "neck"))}
    assert fast == norms
    assert {g["lr"] for g in groups} == {0.1, 0.5}


def test_layer_decay_gives_a_norm_the_rate_of_its_layer():
    base = timm.create_model("resnet10t", num_classes=3)
    model = convert(base, "cn-x")
    scale = {
        id(p): g["lr_scale"]
        for g in timm.optim.param_groups_layer_decay(base, layer_decay=0.5)
        for p in g["params"]
    }
    expected = {n: scale[id(p)] for n, p in base.named_parameters()}
    groups = normswap.param_groups(model, lr=2.0, layer_decay=0.5)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    actual = {n: rate[id(p)] for n, p in model.named_parameters()}
    for name, value in actual.items():
        sibling = name.replace(".mu", ".weight").replace(".log_sigma", ".weight")
        assert value == 2.0 * expected[sibling], name
    assert len(set(actual.values())) > 3


@pytest.mark.parametrize("settings", [{}, {"norm_lr": 0.02}, {"layer_decay": 0.5}])
def test_a_rate_that_is_a_tensor_gives_the_rates_of_a_number(settings):
    model, rate = convert(timm.create_model("resnet10t"), "cn"), torch.tensor(0.1)
    groups = [normswap.param_groups(model, lr, 0.05, **settings) for lr in (0.1, rate)]
    rates = [[float(g["lr"]) for g in found] for found in groups]
    assert rates[1] == pytest.approx(rates[0])
    assert rate == torch.tensor(0.1)


def test_frozen_parameters_are_in_no_group():
    model = convert(ConvNet(), "cn")
    model.head.requires_grad_(False)
    listed = {id(p) for g in normswap.param_groups(model, 0.1) for p in g["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "expected lr= of 0 or more, got -1.0"),
        ({"lr": float("nan")}, "expected lr="),
        ({"lr": 1.0, "weight_decay": -0.1}, "expected weight_decay="),
        ({"lr": 1.0, "norm_lr": -0.1}, "expected norm_lr="),
        ({"lr": 1.0, "layer_decay": 0.0}, r"expected layer_decay= in \(0, 1\]"),
    ],
)
def test_rates_out_of_range_are_refused(settings, message):
    with pytest.raises(normswap.ConversionError, match=message):
        normswap.param_groups(convert(ConvNet(), "cn"), **settings)


def test_nothing_to_train_is_refused():
    model = convert(ConvNet(), "cn").requires_grad_(False)
    with pytest.raises(normswap.ConversionError, match="requires a gradient"):
        normswap.param_groups(model, 0.1)


def test_timms_factory_spares_the_norms_of_a_compiled_model():
    model = convert(ConvNet(), "cn-x")
    compiled = torch.compile(model, backend="eager")
    optimizer = timm.optim.create_optimizer_v2(compiled, "adamw", lr=0.1, weight_decay=0.05)
    assert decayed(model, optimizer.param_groups) == conv_and_head_weights(model)


NO_NUMBERS = [
    (name, value)
    for name in ("lr", "weight_decay", "norm_lr", "layer_decay")
    for value in ("0.1", None, True, [0.1])
    if value is not None or name in ("lr", "weight_decay")  # the others are None by default
]


@pytest.mark.parametrize(("name", "value"), NO_NUMBERS)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(normswap.ConversionError, match=f"expected {name}="):
        normswap.param_groups(convert(ConvNet(), "cn"), **{"lr": 0.1, name: value})
