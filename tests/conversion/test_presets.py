"""The presets: known names, the settings they give, and the layouts that follow."""

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError, CrossNorm, SelfNorm, UnknownNameError
from tests.support.sampling import sampled


def resnet50():
    with torch.device("meta"):
        return timm.create_model("resnet50")


def inserted(report):
    return [(row.fqn, row.target) for row in report.rows if row.action == "inserted"]


def test_the_authors_resnet50_has_selfnorm_after_each_of_its_16_adds():
    found = inserted(normswap.plan(resnet50(), "selfnorm", preset="resnet50-imagenet"))
    blocks = [f"layer{s}.{b}" for s, n in enumerate((3, 4, 6, 3), 1) for b in range(n)]
    assert found == [(block, "SelfNorm (post)") for block in blocks]


def test_the_authors_cnsn_on_imagenet_puts_crossnorm_on_the_image():
    found = inserted(normswap.plan(resnet50(), "cnsn", preset="resnet50-imagenet"))
    assert found[0] == ("", "CrossNorm (input)")
    assert [target for _, target in found[1:]] == ["SelfNorm (post)"] * 16


def test_a_preset_sets_options_and_the_caller_wins_over_it():
    model = normswap.convert(
        timm.create_model("resnet10t"), "cnsn", preset="wideresnet-cifar10", p=0.75, verify=False
    )
    layers = [m for m in model.modules() if isinstance(m, CrossNorm)]
    assert {layer.crop for layer in layers} == {"both"}
    assert layers[0].schedule.p == 0.75
    assert layers[0].schedule.active == 2
    assert layers[0].schedule.num_sites == len(layers) == 4


FAMILIES = [
    ("resnext50_32x4d", "resnext", 16),
    ("efficientnet_b0", "efficientnet", 9),
    ("convnext_atto", "convnext", 12),
    ("vgg11_bn", "vgg", 8),
    ("densenet121", "densenet", 121),
    ("mobilenetv2_050", "mobilenet", 10),
    ("wide_resnet50_2", "wide_resnet", 16),
    ("regnety_004", "regnet", 16),
]


@pytest.mark.parametrize(("name", "preset", "count"), sampled(FAMILIES, 4))
def test_the_preset_of_each_timm_family_fits_it(name, preset, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(inserted(normswap.plan(model, "selfnorm", preset=preset))) == count


def test_the_vit_preset_is_a_norm_at_the_input():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8)
    report = normswap.plan(model, "cn", preset="vit", contexts=2)
    assert inserted(report) == [("", "ContextNorm (input)")]


def test_densenet_cifar_places_before_the_first_convolution_of_each_layer():
    with torch.device("meta"):
        model = timm.create_model("densenet121")
    found = inserted(normswap.plan(model, "crossnorm", preset="densenet-cifar10"))
    assert len(found) == 58
    assert all(name.endswith("norm1") for name, _ in found)


@pytest.mark.parametrize("name", sorted(normswap.PRESETS))
def test_every_preset_names_methods_and_options_that_exist(name):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    for method in normswap.PRESETS[name].methods:
        one = {"active": 1} if method in ("crossnorm", "cnsn") else {}
        if method == "cnsn":
            one["crossnorm_at"] = ""
        report = normswap.plan(net, method, preset=name, placement="input", select="*", **one)
        assert report.count(action="inserted") >= 1


def test_unknown_preset_lists_the_presets():
    with pytest.raises(UnknownNameError, match="resnet50-imagenet"):
        normswap.plan(resnet50(), "selfnorm", preset="resnet51")


def test_preset_without_the_method_says_which_it_has():
    with pytest.raises(ConversionError, match="only for crossnorm, selfnorm, cnsn"):
        normswap.plan(resnet50(), "cn", preset="resnet")


def test_selfnorm_starts_as_the_identity_at_every_place_of_a_real_model():
    model = timm.create_model("resnet14t").eval()
    x = torch.randn(2, 3, 32, 32)
    for placement in ("norm", "pre", "residual", "identity", "post", "input"):
        converted = normswap.convert(model, "selfnorm", placement=placement)
        assert converted(x).equal(model(x))
        assert sum(isinstance(m, SelfNorm) for m in converted.modules()) > 0


def test_active_above_the_number_of_places_is_refused():
    with pytest.raises(ConversionError, match=r"active= in \[1, 16\]"):
        normswap.plan(resnet50(), "crossnorm", active=17)


def test_the_authors_cnsn_on_gta5_has_crossnorm_after_blocks_and_selfnorm_on_branches():
    report = normswap.plan(resnet50(), "cnsn", preset="fcn-gta5")
    blocks = [f"layer{s}.{b}" for s, n in enumerate((3, 4, 6, 3), 1) for b in range(n)]
    assert inserted(report) == [
        *((block, "CrossNorm (post)") for block in blocks),
        *((block, "SelfNorm (residual)") for block in blocks),
    ]
