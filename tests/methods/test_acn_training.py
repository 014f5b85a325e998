"""ACN trained: components separate, nothing breaks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from normswap import AdaptiveContextNorm
from tests.support.acn import ASSIGNMENTS, STATISTICS, make_bimodal
from tests.support.builders import assert_close, make_batch


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


@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_no_nan_in_steps_at_lr_0_1_with_dead_channels(statistics, steps):
    net = make_deep(statistics=statistics)
    label = torch.randint(0, 3, (64,))
    x = torch.randn(64, 6, 3, 3) + label.view(-1, 1, 1, 1)
    x[:, :2] = 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
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
