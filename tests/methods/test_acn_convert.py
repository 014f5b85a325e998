"""ACN as a method: starts, conversion, checkpoints, compilation."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import normswap
from normswap import AdaptiveContextNorm, ConversionError, UnknownNameError
from normswap.methods.acn_layer import AdaptiveContextNorm as Layer
from tests.support.acn import EVERY, EVERY_KIND, STATISTICS, Net, make_acn, make_net
from tests.support.builders import assert_close, make_batch, random_, trained_norm

X = make_batch((6, 3, 7, 7))


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("strength", [None, 0.1, 3.0])
@EVERY_KIND
def test_skewed_start_keeps_the_function_exactly(options, strength, components):
    base, x = trained_norm(dtype=torch.float64), make_batch((3, 4, 5, 5))
    layer = normswap.convert(base, "acn", components=components, strength=strength, **options)
    assert_close(layer(x), base(x), 1e-12)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("components", [1, 2, 3, 6])
def test_jitter_keeps_the_function_to_the_stated_order(statistics, components):
    base = trained_norm(dtype=torch.float64)
    z = torch.linspace(-4, 4, 81, dtype=torch.float64)
    sigma = (base.running_var + base.eps).sqrt()
    x = base.running_mean + z.unsqueeze(1) * sigma
    expected = base(x[:, :, None, None])
    previous = None
    for strength in (0.2, 0.1, 0.05):
        layer = normswap.convert(
            base, "acn", statistics=statistics, components=components, start="jitter",
            strength=strength,
        )  # fmt: skip
        error = (layer(x[:, :, None, None]) - expected).detach().abs().squeeze()
        scale = base.weight.detach() * (z.abs() + z.abs() ** 3).unsqueeze(1)
        assert (error <= strength**4 * scale + 1e-6).all()
        largest = float(error.max())
        if previous and components > 1:
            assert 10 < previous / largest < 22  # the fourth order: 16
        previous = largest


def test_jitter_is_refused_where_its_compensation_does_not_hold():
    for assignment in ("position", "instance"):
        with pytest.raises(ConversionError, match="use start='skewed', which is exact"):
            normswap.convert(trained_norm(), "acn", start="jitter", assignment=assignment)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"components": 0}, ConversionError, "components= of at least 1, got 0"),
        ({"components": 2.0}, ConversionError, "components= as a count, got 2.0"),
        ({"components": True}, ConversionError, "as a count, got True"),
        ({"statistics": "x"}, UnknownNameError, "the choices are batch, learned"),
        ({"assignment": 3}, UnknownNameError, "the choices are channel, position, instance"),
        ({"start": "both"}, UnknownNameError, "the choices are skewed, jitter"),
        ({"strength": 0.0}, ConversionError, r"strength= in \(0, 5\] for start='skewed', got 0.0"),
        ({"start": "jitter", "strength": 0.6}, ConversionError, r"in \(0, 0.5\]"),
        ({"strength": math.nan}, ConversionError, "got nan"),
        ({"strength": "much"}, ConversionError, "got 'much'"),
        ({"k": 3}, ConversionError, "its options: components, statistics, assignment, start"),
        ({"contexts": 2}, ConversionError, "takes no contexts, got contexts=2; leave it out"),
        ({"priors": [1.0]}, ConversionError, r"got priors=\[1.0\]; leave it out"),
        ({"unknown": "error"}, ConversionError, "got unknown='error'; leave it out"),
    ],
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        normswap.convert(trained_norm(), "acn", **options)


def test_an_instance_norm_is_refused_with_the_reason():
    model = nn.Sequential(nn.InstanceNorm2d(4), nn.BatchNorm2d(4))
    rows = normswap.summary(normswap.convert(model, "acn")).rows
    assert [row.action for row in rows] == ["refused", "replaced"]
    assert "an instance norm has a set for each instance" in rows[0].reason


@EVERY_KIND
def test_conversion_keeps_the_forward_signature_and_the_function(options):
    base, model = make_net(**options)
    assert type(model) is Net
    assert model.forward.__func__ is Net.forward
    assert_close(model(X), base(X))
    assert normswap.verify(model, base, X).largest < 1e-12


def test_frozen_affine_mode_and_hooks_stay():
    base = Net()
    base.norm.eval().requires_grad_(False)
    calls = []
    base.norm.register_forward_hook(lambda *_: calls.append(1))
    model = normswap.convert(base, "acn").train(True)
    normswap.convert(base, "acn")(X)
    assert calls == [1]
    assert not normswap.convert(base, "acn").norm.training
    assert not any(p.requires_grad for p in model.norm.parameters())
    assert all(p.requires_grad for p in model.conv.parameters())


def test_fused_drop_and_act_stay():
    timm_layers = pytest.importorskip("timm.layers")
    base = timm_layers.BatchNormAct2d(4, drop_layer=nn.Dropout, act_layer=nn.ReLU).eval()
    layer = normswap.convert(base, "acn")
    assert isinstance(layer.act, nn.ReLU)
    x = make_batch((2, 4, 3, 3), dtype=torch.float32)
    assert_close(layer(x), base(x), 1e-6)


def test_norm_without_affine_gains_one():
    base, x = trained_norm(dtype=torch.float64, affine=False), make_batch((3, 4, 5, 5))
    layer = normswap.convert(base, "acn")
    assert_close(layer(x), base(x), 1e-12)
    assert layer.weight.requires_grad


def test_frozen_batch_norm_stays_frozen():
    torchvision_ops = pytest.importorskip("torchvision.ops")
    base = torchvision_ops.FrozenBatchNorm2d(4).double()
    random_(base.running_mean, 1, -1, 1)
    layer, x = normswap.convert(base, "acn").train(), make_batch((3, 4, 5, 5))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    assert_close(layer(x), base(x), 1e-12)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert not any(p.requires_grad for p in layer.parameters())


@EVERY_KIND
def test_base_checkpoint_loads_after_training(options):
    base, _ = make_net()
    _, model = make_net(**options)
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.add_(torch.rand_like(parameter))
    model.load_state_dict(base.state_dict())
    assert_close(model(X), base(X))


def test_base_checkpoint_with_missing_keys_names_them():
    layer = Layer(4)
    with pytest.raises(RuntimeError, match=r"Missing key.*mu"):
        layer.load_state_dict({"weight": torch.ones(4), "bias": torch.zeros(4)})


@EVERY_KIND
def test_state_dict_saves_loads_and_copies(options):
    model = make_acn(**options).eval()
    x, file = make_batch((3, 4, 5)), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = AdaptiveContextNorm(4, 3, dtype=torch.float64, **options).eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# Each assignment and each kind of statistics in both modes.
@pytest.mark.parametrize(("options", "training"), list(zip(EVERY, [True, False] * 3, strict=True)))
def test_compiles_into_one_graph(options, training):
    torch._dynamo.reset()
    _, model = make_net(training, **options)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    actual, expected = compiled(X), model(X)
    assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad, 1e-10)
    for value, other in zip(compiled.buffers(), model.buffers(), strict=True):
        assert_close(value, other)


@EVERY_KIND
def test_exports(options):
    _, model = make_net(**options)
    program = torch.export.export(model, (X,)).module()
    assert_close(program(X + 1), model(X + 1))


def test_summary_speaks_of_components_and_finds_them_apart_once_they_are():
    _, model = make_net(components=2, start="jitter", strength=0.1)
    report = normswap.summary(model)
    (row,) = report.rows
    assert (row.components, row.contexts, row.delivery) == (2, 0, "")
    assert report.options["assignment"] == "channel"
    assert "components=2, statistics=batch" in report.heading()
    assert "context" not in report.text()
    before = row.divergence
    with torch.no_grad():
        model.norm.running_mean[0] += 3
    assert normswap.summary(model).rows[0].divergence > 10 * before
