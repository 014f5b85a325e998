"""What is a residual block, and what its branch and skip are: by hand, and in timm's models."""

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError
from tests.support.sampling import sampled
from tests.support.scaling import Basic, double, output, scale_method

__all__ = ["scale_method"]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("placement", "expected"),
    [("pre", 3 * 4 + 1), ("residual", 3 * 4 + 1), ("identity", 4 + 3), ("post", 3 * 5)],
)
def test_each_placement_scales_its_own_part_of_the_block(placement, expected, swap, inplace):
    value, model = output(Basic(swap=swap, inplace=inplace), placement, 3.0)
    assert value == expected
    assert model.scale.place.placement == placement


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("pre", 12 + 2), ("residual", 12 + 2), ("identity", 4 + 6), ("post", 18)],
)
def test_the_longer_side_is_the_branch_when_the_skip_has_a_convolution(placement, expected):
    assert output(Basic(downsample=True), placement, 3.0)[0] == expected


def test_post_comes_before_the_activation():
    assert output(Basic(), "post", -1.0, x=1.0)[0] == 0.0


def test_the_plan_names_the_branch_and_the_skip():
    report = normswap.plan(nn.Sequential(Basic(downsample=True)), "scale")
    assert report.rows[0].reason == "branch conv1, conv2; skip downsample"
    assert report.rows[0].target == "Scale (post)"
    assert report.rows[0].layer == "0.scale"


class TwoEqualBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 1, 1)
        self.other = nn.Conv2d(1, 1, 1)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x):
        return self.bn(self.one(x) + self.other(x))


def test_an_ambiguous_add_is_reported_not_guessed():
    with pytest.raises(ConversionError, match="both operands have 1 layers"):
        normswap.plan(TwoEqualBranches(), "scale", placement="post")


def test_a_default_placement_falls_back_to_norms_only_without_any_block():
    report = normswap.plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "scale")
    assert report.rows[0].target == "Scale (norm)"


class Positional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.embed(x) + self.position)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x):
        one, other = self.bn(x).chunk(2, dim=1)
        return one + self.conv(torch.cat([other, other], 1))[:, :1]


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(1, 2, 1)
        self.coarse = nn.Conv2d(2, 2, 2, 2)

    def forward(self, x):
        fine = self.fine(x)
        return [fine, self.coarse(fine)]


class Pyramid(nn.Module):
    """A decoder: one map is brought to the size of another and added, each from its own source."""

    def __init__(self):
        super().__init__()
        self.levels = Levels()
        self.deep = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
        self.lateral = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x):
        maps = self.levels(x)
        fine = self.lateral(maps[0])
        return self.bn(fine + nn.functional.interpolate(self.deep(maps[1]), fine.shape[-2:]))


@pytest.mark.parametrize("block", [Positional, Halves, Pyramid])
def test_adds_that_are_not_residual_get_no_layer(block):
    with pytest.raises(ConversionError, match="found no place"):
        normswap.plan(block(), "scale", placement="post")


OF_TIMM = [
    ("resnet18", 8, "branch conv1, conv2; skip identity"),
    ("resnetv2_50", 16, "branch conv1, conv2, conv3; skip downsample"),
    ("regnety_004", 16, "branch conv1, conv2, se, conv3; skip downsample"),
    ("efficientnet_b0", 9, "branch conv_pw, conv_dw, se, conv_pwl; skip identity"),
    ("res2net50_14w_8s", 16, None),
    ("convnext_atto", 12, "branch conv_dw, mlp; skip identity"),
    # As those of others.
    ("resnet50", 16, "branch conv1, conv2, conv3; skip downsample"),
    ("wide_resnet50_2", 16, "branch conv1, conv2, conv3; skip downsample"),
    ("resnext50_32x4d", 16, "branch conv1, conv2, conv3; skip downsample"),
    ("mobilenetv2_050", 10, "branch conv_pw, conv_dw, conv_pwl; skip identity"),
]


@pytest.mark.parametrize(("name", "blocks", "example"), sampled(OF_TIMM, 6))
def test_blocks_of_timm_models(name, blocks, example):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = normswap.plan(model, "scale", placement="post")
    inserted = [row for row in report.rows if row.action == "inserted"]
    assert len(inserted) == blocks
    assert example is None or inserted[0].reason == example


@pytest.mark.parametrize("name", ["densenet121", "vgg11_bn"])
def test_models_without_blocks_get_a_layer_after_each_norm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = normswap.plan(model, "scale")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert report.count(action="inserted") == norms
    assert report.rows[0].target == "Scale (norm)"


class ThreeWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 1, 1)
        self.b = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x + self.a(x) + self.b(x)


def test_a_partial_sum_of_an_ambiguous_add_gets_no_layer():
    with pytest.raises(ConversionError, match="both operands have 1 layers"):
        normswap.plan(ThreeWay(), "scale", placement="post")


class Resized(nn.Module):
    """Branch and skip share the size they are brought to; it is no feature."""

    def __init__(self):
        super().__init__()
        self.conv = double(nn.Conv2d(1, 1, 1, bias=False))

    def forward(self, x):
        size = x.shape[2:]
        branch = self.conv(nn.functional.interpolate(self.conv(x), size=size))
        return branch + nn.functional.interpolate(x, size=size)


def test_a_shared_size_is_not_where_a_block_starts():
    assert output(Resized(), "pre", 3.0)[0] == 4 * 3 + 1
