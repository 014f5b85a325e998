import copy
import json
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recipes import adversarial
from recipes.__main__ import main
from recipes.common import tiles
from recipes.common.data import Loader
from recipes.common.options import of_cell

HOW = Namespace(eps=8.0, attack_steps=3)
EPS = 8 / 255 / tiles.STD


class Spy(nn.Module):
    """Notes what a network is given, what it is told, and in which mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x, context):
        self.seen.append((x.detach().clone(), context, self.training))
        return self.model(x)


@pytest.fixture
def loader():
    data = tiles.tiles(16, seed=0, limit=2)
    return Loader(data, (tiles.MEAN,) * 3, (tiles.STD,) * 3, 8, torch.device("cpu"))


@pytest.fixture
def spy():
    torch.manual_seed(0)
    return Spy(tiles.network(12))


def test_an_attack_raises_the_loss_within_its_bounds_and_leaves_the_model_as_it_was(loader):
    torch.manual_seed(0)
    model = tiles.network(12).train()
    before = copy.deepcopy(model.state_dict())
    batch = loader.batch(loader.test_indices())
    found = adversarial.attack(model, batch.images, batch.labels, HOW, "adversarial")

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (found - batch.images).abs().max() <= EPS + 1e-6
    assert found.abs().max() <= 2  # pixels of 0 and 255

    def loss(x):
        return F.cross_entropy(model.eval()(x), batch.labels).item()

    noise = EPS * (2 * torch.rand_like(found) - 1).sign()
    assert loss(found) > loss(batch.images + noise) + 0.01
    assert loss(found) > loss(batch.images) + 0.01


def test_more_steps_of_an_attack_hurt_more(loader):
    torch.manual_seed(0)
    model = tiles.network(12)
    batch = loader.batch(loader.test_indices())
    losses = []
    for steps in (1, 8):
        how = Namespace(eps=8.0, attack_steps=steps)
        torch.manual_seed(1)
        x = adversarial.attack(model, batch.images, batch.labels, how, "adversarial")
        losses.append(F.cross_entropy(model.eval()(x), batch.labels).item())
    assert losses[1] > losses[0]


def test_a_model_is_told_the_kind_that_each_figure_is_of(spy, loader):
    adversarial.measure(spy, loader, HOW)

    clean = loader.batch(loader.test_indices()).images
    told = [context for _, context, _ in spy.seen]
    assert told == ["clean"] + 4 * ["adversarial"] + 4 * ["clean"]
    assert not any(training for _, _, training in spy.seen)
    assert torch.equal(spy.seen[0][0], clean)
    for x, _, _ in spy.seen[1:]:
        assert 0 < (x - clean).abs().max() <= EPS + 1e-6


def test_a_step_trains_on_clean_images_and_on_their_adversarial_versions(spy, loader, monkeypatch):
    monkeypatch.setattr(adversarial, "start", lambda *_: (spy, loader))
    config = of_cell(HOW, method="cn", seed=0, epochs=1, lr=1e-3)
    adversarial.train_one(loader.data, config, lambda _: None)

    first = next(iter(loader.train_epoch(0, 0))).images
    *attacks, (both, kinds, training) = spy.seen[:4]
    assert [(context, mode) for _, context, mode in attacks] == 3 * [("adversarial", False)]
    assert kinds.tolist() == 8 * [0] + 8 * [1]
    assert adversarial.KINDS == ("clean", "adversarial")
    assert training
    assert torch.equal(both[:8], first)
    assert 0 < (both[8:] - first).abs().max() <= EPS + 1e-6


def test_the_smoke_setting_compares_clean_and_attacked_images(tmp_path):
    given = ["adversarial", "--smoke", "--methods", "bn", "bn-both", "cn-first", "cn-x-batch"]
    assert main([*given, "--out", str(tmp_path), "--name", "run"]) == 0

    kept = json.loads((tmp_path / "run" / "table.json").read_text())
    found = {r["cell"]["method"]: set(r) - {"cell"} for r in kept["records"]}
    assert found["bn"] == found["bn-both"] == {"clean", "attacked", "seconds"}
    told = {"clean", "attacked", "unknown", "seconds"}
    assert found["cn-first"] == found["cn-x-batch"] == told
    report = (tmp_path / "run" / "report.txt").read_text()
    assert "clean, above bn" in report
    assert "attacked, above bn" in report
