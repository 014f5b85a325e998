"""Where layers are inserted: hand-written blocks with known answers, and real ones."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError
from normswap.methods.base import InsertedMethod


class Scale(nn.Module):
    """Multiplies by a factor that starts at one: the place it sits at shows in the output."""

    def __init__(self, start):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x):
        return x * self.factor


@dataclass(frozen=True)
class ScaleOptions:
    start: float = 1.0


@pytest.fixture(autouse=True, scope="module")
def _scale_method():
    from normswap.methods import base

    @normswap.register_method
    class ScaleMethod(InsertedMethod):
        name = "scale"
        title = "a factor"
        options = ScaleOptions

        def insert(self, place, options):
            layer = Scale(options.start)
            layer.place = place
            return layer

    yield
    del base._REGISTRY["scale"]


def double(module):
    """Stand for a layer: known weights make the arithmetic of a block checkable by hand."""
    nn.init.constant_(module.weight, 2.0)
    return module


class Basic(nn.Module):
    """y = relu(2 * 2 * x + x), as 1x1 convolutions of one channel."""

    def __init__(self, swap=False, downsample=False, inplace=False):
        super().__init__()
        self.conv1 = double(nn.Conv2d(1, 1, 1, bias=False))
        self.bn1 = nn.BatchNorm2d(1, eps=0.0)
        self.conv2 = double(nn.Conv2d(1, 1, 1, bias=False))
        self.downsample = double(nn.Conv2d(1, 1, 1, bias=False)) if downsample else nn.Identity()
        self.act = nn.ReLU()
        self.swap = swap
        self.inplace = inplace

    def forward(self, x):
        shortcut = self.downsample(x)
        out = self.conv2(self.bn1(self.conv1(x)))
        if self.inplace:
            out += shortcut
        else:
            out = shortcut + out if self.swap else out + shortcut
        return self.act(out)


def output(block, placement, start, x=1.0):
    model = normswap.convert(block.eval(), "scale", placement=placement, start=start)
    return model(torch.full((1, 1, 1, 1), x)).item(), model


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


@pytest.mark.parametrize(
    ("name", "blocks", "example"),
    [
        ("resnet18", 8, "branch conv1, conv2; skip identity"),
        ("resnet50", 16, "branch conv1, conv2, conv3; skip downsample"),
        ("resnetv2_50", 16, "branch conv1, conv2, conv3; skip downsample"),
        ("wide_resnet50_2", 16, "branch conv1, conv2, conv3; skip downsample"),
        ("resnext50_32x4d", 16, "branch conv1, conv2, conv3; skip downsample"),
        ("regnety_004", 16, "branch conv1, conv2, se, conv3; skip downsample"),
        ("efficientnet_b0", 9, "branch conv_pw, conv_dw, se, conv_pwl; skip identity"),
        ("mobilenetv2_050", 10, "branch conv_pw, conv_dw, conv_pwl; skip identity"),
        ("res2net50_14w_8s", 16, None),
        ("convnext_atto", 12, "branch conv_dw, mlp; skip identity"),
    ],
)
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


@pytest.mark.parametrize("placement", ["norm", "pre", "residual", "identity", "post", "input"])
def test_an_identity_layer_leaves_the_function_class_keys_and_signature(placement):
    import inspect

    model = timm.create_model("resnet10t").eval()
    x = torch.randn(2, 3, 32, 32)
    converted = normswap.convert(model, "scale", placement=placement)
    assert converted(x).equal(model(x))
    assert isinstance(converted, type(model))
    assert set(model.state_dict()) <= set(converted.state_dict())
    assert inspect.signature(converted.forward) == inspect.signature(model.forward)
    clone = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert clone(x).equal(model(x))
    clone.train()(x).sum().backward()
    grads = [p.grad for n, p in clone.named_parameters() if "factor" in n]
    assert all(g is not None and g.isfinite() for g in grads)


def test_channels_of_every_place_are_those_that_arrive():
    seen = []

    def record(module, args):
        seen.append((module.place.channels, args[0].shape[1]))

    for placement in ("pre", "residual", "identity", "post", "norm", "input"):
        for name in ("resnet26t", "regnety_002", "efficientnet_b0", "convnext_atto"):
            if placement == "norm" and name == "convnext_atto":
                continue
            model = timm.create_model(name).eval()
            model = normswap.convert(model, "scale", placement=placement, verify=False)
            for module in model.modules():
                if isinstance(module, Scale):
                    module.register_forward_pre_hook(record)
            model(torch.randn(1, 3, 32, 32))
    assert len(seen) > 150
    assert all(planned == arrived for planned, arrived in seen)


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
        branch = nn.functional.interpolate(self.conv(x), size=size)
        return branch + nn.functional.interpolate(x, size=size)


def test_a_shared_size_is_not_where_a_block_starts():
    assert output(Resized(), "pre", 3.0)[0] == 2 * 3 + 1


def test_tokens_with_channels_last_are_refused_by_name():
    with pytest.raises(ConversionError, match="channels last"):
        normswap.plan(timm.create_model("vit_tiny_patch16_224"), "scale", placement="post")


def test_before_an_instance_norm_after_a_batch_norm():
    net = nn.Sequential(nn.InstanceNorm2d(2), nn.BatchNorm2d(2)).eval()
    report = normswap.plan(net, "scale", placement="norm")
    assert [row.reason for row in report.rows] == ["before the norm", "after the norm"]
    model = normswap.convert(net, "scale", placement="norm", start=3.0)
    x = torch.randn(2, 2, 4, 4)
    assert torch.allclose(model(x), 3 * net[1](net[0](3 * x)), atol=1e-6)


def test_select_chooses_blocks():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    report = normswap.plan(model, "scale", placement="post", select="layer4.*")
    assert [r.fqn for r in report.rows if r.action == "inserted"] == ["layer4.0", "layer4.1"]


def test_unknown_placement_lists_the_placements():
    with pytest.raises(ConversionError, match="norm, pre, residual, identity, post, input"):
        normswap.plan(Basic(), "scale", placement="middle")


def test_a_method_that_replaces_norms_takes_input_only():
    with pytest.raises(ConversionError, match="replaces norms where they are"):
        normswap.plan(Basic(), "cn", placement="post")


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_a_norm_at_the_input_of_a_transformer_starts_as_the_identity(method):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8).eval()
    x = torch.randn(4, 3, 32, 32)
    converted = normswap.convert(
        model, method, placement="input", contexts=["a", "b"], example_inputs=x
    )
    report = normswap.summary(converted)
    assert report.verification.largest < 1e-5
    assert report.rows[0].layer == "input_norm"
    labels = torch.tensor([0, 1, 0, 1])
    converted.train()(x, context=labels).sum().backward()
    with normswap.use_context(converted, labels):
        converted(x)
    with pytest.raises(normswap.MissingContextError):
        converted(x)


def test_a_failed_insertion_leaves_the_model_as_it_was():
    class Failing(InsertedMethod):
        name = "failing"
        title = "fails"

        def insert(self, place, options):
            raise ConversionError("no")

    model = Basic()
    from normswap.methods import base

    normswap.register_method(Failing)
    try:
        with pytest.raises(ConversionError, match="no"):
            normswap.convert(model, "failing", inplace=True)
    finally:
        del base._REGISTRY["failing"]
    assert type(model) is Basic
    assert [n for n, _ in model.named_children()] == ["conv1", "bn1", "conv2", "downsample", "act"]


class Listed(nn.Sequential):
    """A residual block whose forward runs whatever children it has."""

    def forward(self, x):
        return x + super().forward(x)


class Named(nn.ModuleDict):
    """A model whose forward runs its children by name."""

    def forward(self, x):
        for key in self:
            x = self[key](x)
        for module in dict(self.items()).values():
            assert module in self.values()
        return x


def convolution():
    return nn.Conv2d(4, 4, 3, padding=1)


@pytest.mark.parametrize(
    ("model", "placement", "count"),
    [
        (nn.Sequential(convolution(), nn.BatchNorm2d(4)), "input", 1),
        (Named({"conv": convolution(), "bn": nn.BatchNorm2d(4)}), "input", 1),
        (nn.Sequential(Listed(convolution(), nn.BatchNorm2d(4)), nn.ReLU()), "post", 1),
        (nn.Sequential(Listed(convolution(), nn.BatchNorm2d(4)), nn.ReLU()), "residual", 1),
    ],
)
def test_containers_that_iterate_over_their_children_run_an_inserted_layer_once(
    model, placement, count
):
    model = copy.deepcopy(model).eval()
    x = torch.randn(3, 4, 5, 5)
    length = [len(m) for m in model.modules() if hasattr(m, "__len__")]
    converted = normswap.convert(model, "selfnorm", placement=placement, verify=False)
    layers = [m for m in converted.modules() if isinstance(m, normswap.SelfNorm)]
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    assert converted(x).equal(model(x))
    assert len(layers) == len(calls) == count
    assert [len(m) for m in converted.modules() if hasattr(m, "__len__")] == length
    for layer in layers:
        nn.init.normal_(layer.g.bn_bias)
    expected = converted(x)
    assert not expected.equal(model(x))
    assert copy.deepcopy(converted)(x).equal(expected)
    compiled = torch.compile(copy.deepcopy(converted), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert normswap.revert(converted, discard=True)(x).equal(model(x))
