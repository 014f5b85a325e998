"""Back to plain norms: every class of norm, what was done to it, and what is refused."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normswap
from normswap import ConversionError
from normswap.methods.layer import ContextLayer
from tests.support.builders import SKEWED, assert_close, make_batch, random_, trained_norm
from tests.support.models import same, separate

METHODS = ["cn", "cn-x"]
EACH = pytest.mark.parametrize("method", METHODS)
NAMES = ["a", "b", "c"]


class Odd(nn.BatchNorm2d):
    """A batch norm with things of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.note = ["kept"]
        self.names = "not those of contexts"
        self.register_buffer("seen", torch.ones(2))
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        self.extra = nn.Linear(1, 1)


def frozen(channels, **settings):
    return torchvision.ops.FrozenBatchNorm2d(channels, **settings)


def act(channels):
    norm = timm.layers.BatchNormAct2d(channels, act_layer=nn.PReLU)
    norm.drop = nn.Dropout(0.1)
    return norm


MAKERS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None, eps=1e-2),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm2d": frozen,
    "BatchNormAct2d": act,
    "InstanceNorm2d": nn.InstanceNorm2d,
    "affine InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True),
    "tracked InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "subclass": Odd,
}
EVERY_NORM = pytest.mark.parametrize("kind", MAKERS)


def make_norm(kind):
    norm = MAKERS[kind](4).eval()
    for seed, (name, tensor) in enumerate(norm.state_dict().items()):
        if tensor.is_floating_point():
            random_(tensor, seed, *((-1, 1) if name in ("bias", "running_mean") else (0.5, 2)))
    return norm


def make(kind, method, norm=None):
    norm = make_norm(kind) if norm is None else norm
    base = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    return base, normswap.convert(base, method, contexts=NAMES, priors=SKEWED)


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
@EVERY_NORM
@pytest.mark.parametrize("context", [*NAMES, "pooled"])
def test_every_class_of_norm_is_exact_for_each_context(kind, method, context):
    base, model = make(kind, method)
    separate(model.double())
    x = make_batch((5, 3, 4, 4))
    plain = normswap.specialize(model, context)
    assert type(plain[1]) is type(base[1])
    label = None if context == "pooled" else context
    assert_close(plain(x), model(x, context=label))


@EACH
def test_a_norm_without_affine_gets_one_only_where_it_needs_one(method):
    _, model = make("no affine", method)
    assert normswap.revert(model)[1].weight is None
    with torch.no_grad():
        layer = model[1]
        (layer.running_mean if method == "cn" else layer.mu)[0] += 1
    assert normswap.specialize(model, "a")[1].weight is None
    if method == "cn":
        layer.weight.data[0] += 1
        norm = normswap.specialize(model, "a")[1]
        assert norm.affine
        assert norm.weight.requires_grad


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


def test_sigma_below_eps_goes_into_the_weight():
    _, model = make("BatchNorm2d", "cn-x")
    model.double()
    with torch.no_grad():
        model[1].log_sigma[0] = torch.tensor([-20.0, -8.0, -5.76, 1.0])
    x = make_batch((3, 3, 4, 4))
    assert_close(normswap.specialize(model, "a")(x), model(x, context="a"), 1e-9)


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


@EACH
def test_a_norm_at_the_input_is_dropped_while_it_is_the_identity(method):
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 5, 5])).eval()
    model = normswap.convert(base, method, contexts=2, placement="input", verify=False)
    back = normswap.revert(model)
    assert same(back.state_dict(), base.state_dict())
    assert type(back) is nn.Sequential
    assert "input_norm" not in dict(back.named_children())
    with torch.no_grad():
        model.input_norm.bias[0 if method == "cn" else slice(None)] += 1
    with pytest.raises(ConversionError, match="input_norm, it normalises the input"):
        normswap.specialize(model, 0)
    assert same(normswap.revert(model, discard=True).state_dict(), base.state_dict())


def test_acn_with_equal_components_is_a_batch_norm():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), make_norm("BatchNorm2d")).eval().double()
    for options in ({}, {"statistics": "learned"}, {"assignment": "position"}):
        model = normswap.convert(base, "acn", components=3, **options)
        with torch.no_grad():
            model[1].weight.mul_(2)
            model[1].prior_logits.add_(torch.rand(3, 1))
        x = make_batch((4, 3, 5, 5))
        assert_close(normswap.specialize(model)(x), model(x), 1e-10)


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


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
        lambda: timm.create_model("resnet18", num_classes=5),
        lambda: timm.create_model("densenet121", num_classes=5),
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        lambda: torchvision.models.resnet18(num_classes=5, norm_layer=frozen),
        lambda: torchvision.models.resnet18(num_classes=5, norm_layer=nn.InstanceNorm2d),
    ],
    ids=["lite0", "resnet18", "densenet121", "mobilenet_v3", "frozen", "instance"],
)
@EACH
def test_real_models_specialise_and_revert(build, method):
    base = build().eval()
    for seed, (name, tensor) in enumerate(base.state_dict().items()):
        if "running_var" in name:
            random_(tensor, seed, 0.8, 1.2)
    model = normswap.convert(base, method, contexts=3, verify=False)
    assert same(normswap.revert(model).state_dict(), base.state_dict())
    for layer in model.modules():
        if isinstance(layer, ContextLayer):
            for tensor in layer.state_dict().values():
                if tensor.dim() == 2:
                    tensor.add_(0.05 * torch.rand_like(tensor))
    model.double()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        for context in (2, "pooled"):
            plain = normswap.specialize(model, context)
            assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
            label = None if context == "pooled" else context
            assert_close(plain(x), model(x, context=label), 1e-9)


@EACH
def test_convolutions_fuse_with_the_norms_of_a_specialised_model(method):
    _, model = make("BatchNorm2d", method)
    separate(model.double())
    plain = normswap.specialize(model, "b")
    fused = fuse_conv_bn_eval(plain[0], plain[1])
    x = make_batch((5, 3, 4, 4))
    assert_close(fused(x), model(x, context="b"), 1e-10)
    torch.ao.quantization.fuse_modules(plain, [["0", "1"]], inplace=True)
    assert type(plain[1]) is nn.Identity
    assert_close(plain(x), model(x, context="b"), 1e-10)


def test_nothing_of_the_conversion_is_left_on_the_model():
    model = timm.create_model("resnet10t", num_classes=2)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    reverted = normswap.revert(normswap.convert(model, "cn", contexts=2, verify=False))
    assert {name: set(vars(module)) for name, module in reverted.named_modules()} == before
