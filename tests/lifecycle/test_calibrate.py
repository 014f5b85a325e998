"""Fitting the mixtures of ACN layers to data."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from normswap import AdaptiveContextNorm, ConversionError
from normswap.util.batches import Reservoir
from tests.support.acn import EVERY_KIND, make_bimodal
from tests.support.builders import assert_close


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 3, 1)
        self.second = nn.BatchNorm2d(3)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(self.second(self.conv(self.first(x))))


def make_batches(count=4):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        mode = (torch.rand(8, 2, 1, 1, generator=generator) < 0.5).float() * 6 - 3
        batches.append(mode + torch.randn(8, 2, 5, 5, generator=generator))
    return batches


def make_net(**options):
    torch.manual_seed(0)
    base, batches = Net(), make_batches()
    for norm in (base.first, base.second):
        norm.momentum = None
    for x in batches:
        base(x)
    base.eval()
    return normswap.convert(base, "acn", components=2, **options), batches


@EVERY_KIND
def test_components_find_the_modes_and_the_output_keeps_its_size(options):
    model, batches = make_net(**options)
    x = torch.cat(batches)
    before = model.first(x)
    changed = normswap.calibrate(model, batches)
    after = model.first(x)
    assert set(changed) == {"first", "second"}
    # A position's two channels each have two modes, so that a pair of components has to share.
    if options["assignment"] != "position":
        centres = model.first.mu.detach().sort(0).values
        assert_close(centres, torch.tensor([[-3.0, -3.0], [3.0, 3.0]]), 0.15)
    assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)), 0.05)
    assert_close(after.std((0, 2, 3)), before.std((0, 2, 3)), 0.05)
    # What is returned is the change of the first layer's output over its variance.
    over = (after - before).square().mean() / before.var((0, 2, 3), correction=0).mean()
    assert abs(float(over.detach()) - changed["first"]) < 0.05


def test_the_sample_covers_all_values_where_it_is_large_enough():
    model, batches = make_net(assignment="channel")
    normswap.calibrate(model, batches, samples=10_000)
    x = torch.cat(batches)
    tau = normswap.functional.responsibilities(x, model.first.mixture())
    mean = (tau * x).sum((1, 3, 4)) / tau.sum((1, 3, 4))
    assert_close(model.first.running_mean, mean.detach(), 1e-4)


def test_training_goes_on_from_calibrated_components_with_plain_sgd():
    base = nn.BatchNorm1d(1, dtype=torch.float64)
    x, target = make_bimodal()
    base.momentum = None
    base(x)
    layer = normswap.convert(base, "acn", components=2)
    normswap.calibrate(layer, [x])
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(50):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


def test_modes_and_generators_are_left_as_they_were():
    model, batches = make_net()
    model.train()
    model.second.eval()
    state = torch.get_rng_state()
    normswap.calibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert not model.first._forward_pre_hooks


def test_same_seed_same_result():
    results = []
    for seed in (0, 0, 1):
        model, batches = make_net()
        normswap.calibrate(model, batches, samples=16, seed=seed)
        results.append(model.first.mu.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def failing(batches):
    yield batches[0]
    raise OSError("the disk is gone")


def test_a_loader_that_fails_leaves_the_model_as_it_was():
    model, batches = make_net()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        normswap.calibrate(model, failing(batches))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.first._forward_pre_hooks


def test_values_that_are_not_finite_leave_every_layer_as_it_was():
    model, batches = make_net()
    model.conv.weight.data[0] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConversionError, match="not finite enter second"):
        normswap.calibrate(model, batches)
    pairs = [(v, before[k]) for k, v in model.state_dict().items()]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"loader": []}, "no batch reached an ACN layer"),
        ({"loader": ["text"]}, "expected batches that are a tensor"),
        ({"samples": 3}, "samples= of at least 4, got 3"),
    ],
)
def test_what_cannot_be_calibrated(arguments, match):
    model, batches = make_net()
    with pytest.raises(ConversionError, match=match):
        normswap.calibrate(model, **{"loader": batches, **arguments})


def test_a_model_without_acn_is_refused():
    with pytest.raises(ConversionError, match="found no AdaptiveContextNorm in Net"):
        normswap.calibrate(Net(), [])


def test_batches_of_every_kind():
    expected = None
    for wrap in (lambda x: x, lambda x: (x, 0), lambda x: {"x": x}):
        model, batches = make_net()
        normswap.calibrate(model, [wrap(x) for x in batches], batches=2)
        expected = model.first.mu.detach() if expected is None else expected
        assert torch.equal(model.first.mu, expected)
    model, batches = make_net()
    normswap.calibrate(model, enumerate(batches), forward=lambda m, b: m(b[1]), batches=2)
    assert torch.equal(model.first.mu, expected)


def test_works_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model, batches = make_net()
    assert normswap.calibrate(model, batches)


def test_a_dead_channel_keeps_its_gamma():
    layer = AdaptiveContextNorm(2, 2).eval()
    weight = layer.weight.detach().clone()
    x = torch.randn(64, 2)
    x[:, 1] = 0
    normswap.calibrate(layer, [x])
    assert layer.weight[1] == weight[1]
    assert all(t.isfinite().all() for t in layer.state_dict().values())
    assert_close(layer(x)[:, 1], torch.zeros(64), 1e-6)


def test_a_reservoir_is_a_uniform_sample_of_bounded_size():
    counts = torch.zeros(100)
    for seed in range(2000):
        kept = Reservoir(10, torch.Generator().manual_seed(seed))
        for start in range(0, 100, 20):
            kept.add(20, lambda index, start=start: index + start)
            assert len(kept.rows) == 10
        assert len(kept.rows.unique()) == 10
        counts[kept.rows] += 1
    # 200 each, with a standard deviation of 13.4: five of them.
    assert float((counts - 200).abs().max()) < 67
