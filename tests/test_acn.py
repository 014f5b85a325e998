"""ACN as a layer and as a method."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from normswap import AdaptiveContextNorm, ConversionError, UnknownNameError
from normswap.methods.acn_layer import AdaptiveContextNorm as Layer
from tests.builders import assert_close, make_batch, random_, trained_norm
from tests.mixture_oracle import acn

ASSIGNMENTS = ["channel", "position", "instance"]
STATISTICS = ["batch", "learned"]
EVERY = [{"statistics": s, "assignment": a} for s in STATISTICS for a in ASSIGNMENTS]
EVERY_KIND = pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(o.values()))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Steps of microseconds: a second thread waits longer than it works.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_acn(channels=4, components=3, dtype=torch.float64, **settings):
    layer = AdaptiveContextNorm(channels, components, dtype=dtype, **settings)
    ranges = {
        "weight": (0.5, 1.5),
        "mu": (-1, 2),
        "log_sigma": (-0.3, 0.5),
        "running_var": (0.5, 2),
    }
    for seed, (name, tensor) in enumerate(layer.state_dict().items()):
        if tensor.is_floating_point():
            random_(tensor, seed, *ranges.get(name, (-1, 1)))
    return layer


def parameters_of(layer):
    return [layer.weight, layer.bias, layer.prior_logits, layer.mu, layer.log_sigma]


def reference(layer, x):
    """Return the oracle's output and moments for a layer in its mode."""
    if layer.options.statistics == "learned":
        given, eps = (layer.mu, torch.exp(2 * layer.log_sigma)), 0.0
    elif layer.training:
        given, eps = None, layer.eps
    else:
        given, eps = (layer.running_mean, layer.running_var), layer.eps
    return acn(x, *parameters_of(layer), layer.options.assignment, given, eps)


def gradients(y, tensors):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return torch.autograd.grad(y, tensors, cotangent)


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_output_and_every_gradient_equal_the_loop(options, training):
    layer, x = make_acn(**options).train(training), make_batch((5, 4, 2, 3)).requires_grad_()
    y, _, _ = reference(layer, x)
    expected = gradients(y, [x, *parameters_of(layer)])
    actual = layer(x)
    assert_close(actual, y)
    for value, other in zip(gradients(actual, [x, *parameters_of(layer)]), expected, strict=True):
        assert_close(value, other, 1e-10)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_running_statistics_follow_the_weighted_moments(assignment, momentum):
    layer = make_acn(assignment=assignment, momentum=momentum)
    layer.num_batches_tracked.zero_()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for step in range(1, 4):
        x = make_batch((5, 4, 6), seed=step)
        _, m, v = reference(layer, x)
        rate = 1 / step if momentum is None else momentum
        mean = mean + rate * (m - mean)
        var = var + rate * (v * 30 / 29 - var)
        layer(x)
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, var)
        assert layer.num_batches_tracked == step


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (2, 4, 3, 5), (1, 4, 2, 3, 2)])
def test_one_component_equals_batch_norm(shape, assignment, momentum):
    base = trained_norm(
        {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)],
        dtype=torch.float64,
        momentum=momentum,
    )
    layer = normswap.convert(base, "acn", components=1, assignment=assignment)
    for training in (True, True, False):
        x = make_batch(shape, seed=int(training)).requires_grad_()
        expected, actual = base.train(training)(x), layer.train(training)(x)
        assert_close(actual, expected)
        pairs = zip(
            gradients(actual, [x, layer.weight, layer.bias]),
            gradients(expected, [x, base.weight, base.bias]),
            strict=True,
        )
        for value, other in pairs:
            assert_close(value, other, 1e-10)
        for name in ("mean", "var"):
            tracked = getattr(base, f"running_{name}")
            assert_close(getattr(layer, f"running_{name}")[0], tracked)


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


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(4, dtype=dtype)
        self.head = nn.Linear(4, 2, dtype=dtype)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3)))


def make_net(training=False, **options):
    torch.manual_seed(0)
    base = Net().eval()
    random_(base.norm.running_mean, 1, -1, 1)
    random_(base.norm.running_var, 2, 0.5, 2)
    return base, normswap.convert(base, "acn", **options).train(training)


X = make_batch((6, 3, 7, 7))


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


def test_reset_parameters_makes_a_fresh_batch_norm():
    layer, x = make_acn(), make_batch((3, 4, 5))
    layer.reset_parameters()
    assert_close(layer.eval()(x), nn.BatchNorm1d(4).double().eval()(x), 1e-12)


def test_repr_lists_what_is_not_default():
    assert Layer(4).extra_repr() == "4, components=3"
    assert Layer(4, 2, start="jitter").extra_repr() == (
        "4, components=2, start='jitter', strength=0.05"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_dtype_and_memory_format_come_back(options, training, dtype):
    layer = make_acn(dtype=torch.float32, **options).train(training)
    x = make_batch((4, 4, 3, 5), dtype=dtype).to(memory_format=torch.channels_last)
    wide = copy.deepcopy(layer)(x.float().contiguous())
    y = layer(x.requires_grad_())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, wide.to(dtype), 1e-2 if dtype != torch.float32 else 1e-6)
    y.float().sum().backward()
    assert x.grad.dtype == dtype


@EVERY_KIND
def test_autocast_changes_nothing(options):
    layer, x = make_acn(dtype=torch.float32, **options), make_batch((4, 4, 5), dtype=torch.float32)
    plain, cast = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = copy.deepcopy(layer)(plain)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(cast)
    (gradient,) = torch.autograd.grad(actual.square().sum(), cast)
    assert torch.equal(actual, expected)
    assert_close(gradient, torch.autograd.grad(expected.square().sum(), plain)[0], 1e-6)


@EVERY_KIND
def test_single_value_in_training_takes_the_tracked_statistics(options):
    layer, x = make_acn(**options), make_batch((1, 4))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    y = layer.train()(x)
    assert_close(y, layer.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@EVERY_KIND
def test_batch_of_one_with_positions_trains(options):
    layer, x = make_acn(**options), make_batch((1, 4, 3, 3)).requires_grad_()
    y = layer(x)
    assert_close(y, reference(layer, x)[0])
    assert all(g.isfinite().all() for g in gradients(y, [x, *parameters_of(layer)]))


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_empty_batch(options, training):
    layer = make_acn(**options).train(training)
    assert layer(torch.empty(0, 4, 3, 3, dtype=torch.float64)).shape == (0, 4, 3, 3)


def test_wrong_channels_are_named():
    with pytest.raises(normswap.ContextError, match=r"expected input \(N, 4, \*\)"):
        make_acn()(torch.zeros(2, 3, dtype=torch.float64))


def make_bimodal(samples=16, positions=16):
    """Return a channel with modes at -2 and 2, and what each value is relative to its mode."""
    generator = torch.Generator().manual_seed(0)
    mode = (torch.rand(samples, 1, positions, generator=generator) < 0.5).double() * 4 - 2
    within = 0.5 * torch.randn(samples, 1, positions, generator=generator, dtype=torch.float64)
    return mode + within, within / 0.5


def train_on_bimodal(layer, steps):
    x, target = make_bimodal()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(steps):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.mu.detach().flatten().sort().values, float(loss.detach())


def make_bimodal_layer(**options):
    base = nn.BatchNorm1d(1, dtype=torch.float64)
    with torch.no_grad():
        base.running_var.fill_(4.25)
    return normswap.convert(base, "acn", components=2, **options).train()


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 150), ({"start": "jitter"}, 150), ({"statistics": "learned"}, 400)],
)
def test_components_separate_on_bimodal_data(options, steps):
    layer = make_bimodal_layer(**options)
    mu, loss = train_on_bimodal(layer, steps)
    assert float(mu[1] - mu[0]) > 2
    assert loss < 0.05
    if layer.running_mean is not None:
        centres = layer.running_mean.flatten().sort().values
        assert_close(centres, torch.tensor([-2.0, 2.0]), 0.05)


def test_equal_components_never_separate():
    layer = make_bimodal_layer()
    with torch.no_grad():
        layer.prior_logits.zero_()
    mu, loss = train_on_bimodal(layer, 150)
    assert float(mu[1] - mu[0]) < 1e-9
    assert loss > 0.8


def make_deep(**options):
    """Return a net whose three norms use the three assignments; two input channels are dead."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 3),
    )  # fmt: skip
    for index, assignment in zip((0, 2, 5), ASSIGNMENTS, strict=True):
        net[index] = normswap.convert(net[index], "acn", assignment=assignment, **options)
    return net.train()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_no_nan_in_2000_steps_at_lr_0_1_with_dead_channels(statistics):
    net = make_deep(statistics=statistics)
    label = torch.randint(0, 3, (64,))
    x = torch.randn(64, 6, 3, 3) + label.view(-1, 1, 1, 1)
    x[:, :2] = 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2000):
        rows = slice(step % 8 * 8, step % 8 * 8 + 8)
        loss = F.cross_entropy(net(x[rows]), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite(), step
    assert all(t.isfinite().all() for t in net.state_dict().values())
    assert float(F.cross_entropy(net.eval()(x), label).detach()) < 0.1


def test_training_output_has_unit_spread_and_updates_are_kept():
    # The published layer's training output is sqrt(1 / 0.001) = 31 times too large, and what it
    # writes to its statistics goes to a temporary.
    layer = AdaptiveContextNorm(4, 3)
    x = make_batch((64, 4, 8, 8), dtype=torch.float32)
    y = layer(x)
    assert_close(y.std((0, 2, 3)), torch.ones(4), 1e-2)
    assert float((layer.running_mean - 0.1 * x.mean((0, 2, 3))).abs().max()) < 1e-5
    assert layer.num_batches_tracked == 1
    before = {k: v.clone() for k, v in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).pow(3).mean().backward()
    optimizer.step()
    moved = {k for k, v in layer.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {"weight", "bias", "prior_logits", "mu", "log_sigma"}


def test_every_parameter_exists_before_the_first_forward():
    names = {name for name, _ in AdaptiveContextNorm(4).named_parameters()}
    assert names == {"weight", "bias", "prior_logits", "mu", "log_sigma"}


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False])
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


def test_plan_runs_without_values():
    with torch.device("meta"):
        base = Net()
    assert normswap.plan(base, "acn").rows[0].components == 3


def test_a_converted_model_is_not_converted_again():
    with pytest.raises(ConversionError, match="is converted already"):
        normswap.convert(make_net()[1], "cn")
