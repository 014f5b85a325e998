import copy
import math

import pytest
import torch
from torch import nn

from normswap.functional.style import Style
from normswap.methods.selfnorm import SelfNorm

SHAPES = [(4, 3), (4, 3, 5), (4, 3, 4, 2), (4, 3, 2, 3, 2)]


def trained(num_features, gates, init="identity", dtype=torch.float64):
    """A layer with every parameter and buffer away from its start."""
    layer = SelfNorm(num_features, gates, init, dtype=dtype)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def scalars(x):
    return [(n, c) for n in range(x.shape[0]) for c in range(x.shape[1])]


def oracle_statistics(x, n, c):
    values = list(x[n, c].reshape(-1))
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, mean * 0
    var = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, (var + 1e-12).sqrt()


def oracle_gate(x, state, prefix, scale, batch):
    """The gate of each instance and channel, and the running statistics after it."""
    z, gate = {}, {}
    running_mean, running_var = (state[f"{prefix}.running_{s}"].clone() for s in ("mean", "var"))
    for n, c in scalars(x):
        mean, std = oracle_statistics(x, n, c)
        w = state[f"{prefix}.weight"][c]
        z[n, c] = w[0] * mean + w[1] * std
    count = x.shape[0]
    for c in range(x.shape[1]):
        mean, var = running_mean[c].clone(), running_var[c].clone()
        if batch:
            mean = sum(z[n, c] for n in range(count)) / count
            squares = sum((z[n, c] - mean) ** 2 for n in range(count))
            var = squares / count
            running_mean[c] = 0.9 * running_mean[c] + 0.1 * mean.detach()
            running_var[c] = 0.9 * running_var[c] + 0.1 * squares.detach() / (count - 1)
        for n in range(count):
            normal = (z[n, c] - mean) / (var + 1e-5).sqrt()
            logit = state[f"{prefix}.bn_weight"][c] * normal + state[f"{prefix}.bn_bias"][c]
            gate[n, c] = scale / (1 + torch.exp(-logit))
    return gate, running_mean, running_var


def oracle_selfnorm(x, state, gates, scale, batch):
    g, *running = oracle_gate(x, state, "g", scale, batch)
    f = oracle_gate(x, state, "f", scale, batch)[0] if gates == 2 else None
    rows = []
    for n, c in scalars(x):
        row = x[n, c] * g[n, c]
        if f is not None:
            mean = oracle_statistics(x, n, c)[0]
            row = (x[n, c] - mean) * g[n, c] + mean * f[n, c]
        rows.append(row)
    return torch.stack(rows).reshape(x.shape), running


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_gradients_and_running_statistics_match_the_loop(shape, gates, training, init):
    torch.manual_seed(0)
    layer = trained(3, gates, init).train(training)
    state = {
        k: v.detach().clone().requires_grad_("running" not in k)
        for k, v in layer.state_dict().items()
    }
    x = torch.randn(shape, dtype=torch.float64).add_(0.5).requires_grad_()
    scale = 2.0 if init == "identity" else 1.0
    expected, running = oracle_selfnorm(x, state, gates, scale, training)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(x)
    names = [name for name, _ in layer.named_parameters()]
    ours = torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad((expected * cotangent).sum(), [x, *(state[n] for n in names)])
    for name, a, b in zip(["x", *names], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(layer.g.running_mean, running[0])
    torch.testing.assert_close(layer.g.running_var, running[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gates", [1, 2])
def test_matches_torch_modules_arranged_as_published(gates, training):
    torch.manual_seed(0)
    layer = trained(3, gates, "paper").train(training)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    mean, std = x.mean((2, 3)), (x.flatten(2).var(2) + 1e-12).sqrt()
    values = []
    for gate in [layer.g] if gates == 1 else [layer.g, layer.f]:
        linear = nn.Conv1d(3, 3, 2, bias=False, groups=3).double()
        norm = nn.BatchNorm1d(3).double().train(training)
        linear.weight.data.copy_(gate.weight.unsqueeze(1))
        norm.weight.data.copy_(gate.bn_weight)
        norm.bias.data.copy_(gate.bn_bias)
        norm.running_mean.copy_(gate.running_mean)
        norm.running_var.copy_(gate.running_var)
        values.append(torch.sigmoid(norm(linear(torch.stack([mean, std], 2)))).unsqueeze(3))
    expected = x * values[0]
    if gates == 2:
        expected = expected + mean.reshape(4, 3, 1, 1) * (values[1] - values[0])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gates", [1, 2])
def test_two_gates_scale_spread_and_mean(gates, training):
    layer = trained(3, gates).train(training)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    y = layer(x)
    scaled, shifted = y.std((2, 3)) / x.std((2, 3)), y.mean((2, 3)) / x.mean((2, 3))
    if gates == 1:
        torch.testing.assert_close(scaled, shifted)
    else:
        assert (scaled - shifted).abs().min() > 1e-6


@pytest.mark.parametrize("gates", [1, 2])
def test_passes_gradcheck(gates):
    torch.manual_seed(0)
    layer = trained(2, gates)
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gates", [1, 2])
def test_the_identity_start_is_bitwise_with_the_whole_gradient(gates, training, dtype):
    torch.manual_seed(0)
    layer = SelfNorm(3, gates).train(training)
    for shape in [*SHAPES, (4, 3, 1, 1), (1, 3, 2, 2)]:
        x = (torch.randn(shape) * 100 + 7).to(dtype).requires_grad_()
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, x)
        cotangent = torch.randn(shape).to(dtype)
        (gradient,) = torch.autograd.grad(y, x, cotangent)
        assert torch.equal(gradient, cotangent)


@pytest.mark.parametrize("gates", [1, 2])
def test_the_identity_start_learns(gates):
    torch.manual_seed(0)
    layer, x = SelfNorm(3, gates), torch.randn(16, 3, 4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        loss = (layer(x) - 0.5 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_the_paper_start_is_the_published_one():
    layer = SelfNorm(500, 2, init="paper")
    bound = math.sqrt(0.5)
    for gate in (layer.g, layer.f):
        assert gate.weight.abs().max() <= bound
        assert gate.weight.var().sub(bound**2 / 3).abs() < 0.02
        assert gate.bn_weight.eq(1).all()
        assert gate.bn_bias.eq(0).all()
    gates = layer.g(Style(torch.randn(64, 500), torch.rand(64, 500)))
    assert gates.mean().sub(0.5).abs() < 0.01


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("shape", [(1, *shape[1:]) for shape in SHAPES])
def test_a_training_batch_of_one_uses_and_keeps_the_running_statistics(shape, gates):
    # The published layer fails here: its BatchNorm1d has one value per channel.
    torch.manual_seed(0)
    layer = trained(3, gates)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    after = {k: v.clone() for k, v in layer.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    # A larger batch before backward must not disturb it.
    layer(torch.randn(4, *shape[1:], dtype=torch.float64))
    assert not torch.equal(before["g.running_mean"], layer.g.running_mean)
    twin = trained(3, gates)
    twin.load_state_dict(before)
    expected = twin.eval()(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 3, 1, 1), (1, 3, 1, 1), (4, 3, 1, 1, 1)])
def test_one_position_has_std_zero_and_no_nan(shape, gates, init):
    torch.manual_seed(0)
    layer, x = SelfNorm(3, gates, init), torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.g.weight.grad[:, 1].eq(0).all()


@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
@pytest.mark.parametrize("gates", [1, 2])
def test_constant_half_precision_channels_have_finite_gradients(gates, value, module_dtype):
    torch.manual_seed(0)
    layer = SelfNorm(3, gates, "paper", dtype=module_dtype)
    x = torch.full((4, 3, 6, 6), value, dtype=torch.float16)
    x[0, 0] = torch.randn(6, 6)
    x.requires_grad_()
    y = layer(x)
    y.float().mean().backward()
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
