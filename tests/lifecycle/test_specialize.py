"""A specialised model computes one context in the classes of the original."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normswap
from normswap import ConversionError
from normswap.methods.layer import ContextLayer
from tests.support.builders import assert_close, make_batch, random_
from tests.support.models import same, separate
from tests.support.reverted import EACH, EVERY_NORM, NAMES, frozen, make, make_norm
from tests.support.sampling import crossed


@EACH
@EVERY_NORM
def test_every_class_of_norm_is_exact_for_each_context(kind, method):
    base, model = make(kind, method)
    normswap.set_unknown(model, "pooled")
    separate(model.double())
    x = make_batch((5, 3, 4, 4))
    for context in [*NAMES, "pooled"]:
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


def test_sigma_below_eps_goes_into_the_weight():
    _, model = make("BatchNorm2d", "cn-x")
    model.double()
    with torch.no_grad():
        model[1].log_sigma[0] = torch.tensor([-20.0, -8.0, -5.76, 1.0])
    x = make_batch((3, 3, 4, 4))
    assert_close(normswap.specialize(model, "a")(x), model(x, context="a"), 1e-9)


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


REAL = {
    "lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "densenet": lambda: timm.models.DenseNet(8, (2, 2), num_classes=5),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "frozen": lambda: torchvision.models.resnet18(num_classes=5, norm_layer=frozen),
    "instance": lambda: torchvision.models.resnet18(num_classes=5, norm_layer=nn.InstanceNorm2d),
}


@pytest.mark.parametrize(("name", "method"), crossed(REAL, ["cn", "cn-x"]))
def test_real_models_specialise_and_revert(name, method):
    base = REAL[name]().eval()
    for seed, (name, tensor) in enumerate(base.state_dict().items()):
        if "running_var" in name:
            random_(tensor, seed, 0.8, 1.2)
    model = normswap.convert(base, method, contexts=3, unknown="pooled", verify=False)
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
