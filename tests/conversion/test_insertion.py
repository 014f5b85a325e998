"""Where layers are inserted, what they meet there, and what stays as it was."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError
from normswap.methods.base import InsertedMethod
from tests.support.sampling import sampled
from tests.support.scaling import Basic, Scale, scale_method

__all__ = ["scale_method"]


@pytest.mark.parametrize("placement", ["norm", "pre", "residual", "identity", "post", "input"])
def test_an_identity_layer_leaves_the_function_class_keys_and_signature(placement):
    import inspect

    model = timm.create_model("test_resnet").eval()
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


# How many layers are called at the places of a model, all placements together.
CALLED = {"regnety_002": 97, "convnext_atto": 49, "resnet26t": 64, "efficientnet_b0": 86}


@pytest.mark.parametrize("name", sampled(CALLED, 2))
def test_channels_of_every_place_are_those_that_arrive(name):
    seen = []

    def record(module, args):
        seen.append((module.place.channels, args[0].shape[1]))

    original = timm.create_model(name).eval()
    for placement in ("pre", "residual", "identity", "post", "norm", "input"):
        if placement == "norm" and name == "convnext_atto":
            continue
        model = normswap.convert(original, "scale", placement=placement, verify=False)
        for module in model.modules():
            if isinstance(module, Scale):
                module.register_forward_pre_hook(record)
        model(torch.randn(1, 3, 32, 32))
    assert len(seen) == CALLED[name]
    assert all(planned == arrived for planned, arrived in seen)


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
    with pytest.raises(ConversionError, match="norm, output, pre, residual, identity, post, input"):
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
    from normswap.methods import registry

    normswap.register_method(Failing)
    try:
        with pytest.raises(ConversionError, match="no"):
            normswap.convert(model, "failing", inplace=True)
    finally:
        del registry._REGISTRY["failing"]
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
    compiled = torch.compile(copy.deepcopy(converted), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert normswap.revert(converted, discard=True)(x).equal(model(x))


class Appends(nn.Sequential):
    def forward(self, x, found):
        for layer in self:
            found.append(layer(found[-1]))
        return torch.cat(found, 1)


class Aggregates(nn.Module):
    """Hands a list to a child that changes it, as the blocks of VoVNet do."""

    def __init__(self):
        super().__init__()
        self.layers = Appends(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        found = [x]
        return self.last(self.layers(x, found)) + found[0]


def test_blocks_that_hand_on_lists_that_are_changed_are_named_where_no_place_is_found():
    model = nn.Sequential(Aggregates(), nn.BatchNorm2d(2), Aggregates()).eval()
    with pytest.raises(ConversionError, match=r"at placement 'post': 0: it hands a list .*; 2: it"):
        normswap.convert(model, "scale", placement="post")
    report = normswap.plan(model, "scale", placement=None)
    assert [row.fqn for row in report.rows if row.action == "inserted"] == ["1"]


def test_a_layer_after_the_output_of_modules_that_select_names():
    model = timm.create_model("test_resnet").eval()
    report = normswap.plan(model, "mixstyle", placement="output", select=["layer1", "layer2"])
    assert [(row.fqn, row.action) for row in report.rows] == [
        *(("layer1", "inserted"), ("layer2", "inserted"))
    ]
    settings = {"placement": "output", "select": ["layer1", "layer2"], "p": 1.0}
    converted = normswap.convert(model, "mixstyle", **settings)
    seen = []
    converted.layer1[-1].register_forward_hook(lambda *given: seen.append(given[2]))
    converted.layer2[0].register_forward_pre_hook(lambda *given: seen.append(given[1][0]))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(converted(x), model(x))
    assert torch.equal(*seen)
    seen.clear()
    converted.train()(x)
    assert not torch.equal(*seen)
    assert isinstance(normswap.revert(converted).layer1, torch.nn.Sequential)


def test_the_output_of_modules_has_to_be_selected():
    with pytest.raises(normswap.ConversionError, match="expected select= with placement 'output'"):
        normswap.plan(timm.create_model("resnet10t"), "mixstyle", placement="output")


def test_modules_without_a_forward_have_no_output():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])

        def forward(self, x):
            return self.parts[1](self.parts[0](x))

    with pytest.raises(ConversionError, match="parts: it has no forward after which a layer could"):
        normswap.convert(Listed(), "mixstyle", placement="output", select="parts")
    report = normswap.plan(Listed(), "mixstyle", placement="output", select=["parts", "parts.0"])
    assert [(row.fqn, row.action) for row in report.rows] == [
        *(("parts", "refused"), ("parts.0", "inserted"))
    ]


@pytest.mark.parametrize("placement", ["input", "output"])
def test_a_layer_where_no_tensor_passes_is_an_error_that_says_so(placement):
    class Unpacked(nn.Module):
        def forward(self, batch):
            return {"image": batch["image"] * 2}

    model = nn.Sequential(Unpacked())
    select = "0" if placement == "output" else None
    model = normswap.convert(model, "mixstyle", placement=placement, select=select, verify=False)
    with pytest.raises(normswap.InputError, match=r"to (take|return) a tensor.*got a dict"):
        model({"image": torch.randn(2, 3, 4, 4)})
