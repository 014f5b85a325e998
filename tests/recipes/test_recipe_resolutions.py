import json
import shutil
from argparse import Namespace

import pytest
import torch
from torch import nn

from recipes import resolutions
from recipes.__main__ import main
from recipes.common import tiles
from recipes.common.data import Loader
from recipes.common.grid import read_lines
from recipes.common.options import of_cell


class Spy(nn.Module):
    """Notes the size of what a network is given, and what it is told; copies note there, too."""

    def __init__(self, seen):
        super().__init__()
        self.scores, self.note = nn.Linear(3, 12), lambda *given: seen.append(given)

    def forward(self, x, context):
        self.note(tuple(x.shape[2:]), context)
        return self.scores(x.mean((2, 3)))


@pytest.fixture
def loader():
    data = tiles.tiles(16, seed=0, limit=2)
    return Loader(data, (tiles.MEAN,) * 3, (tiles.STD,) * 3, 8, torch.device("cpu"))


def trained(loader, method, monkeypatch):
    """Train spies in place of networks; give what each of them notes, and the figures."""
    notes = []

    def start(data, config, contexts):
        assert contexts == ["16", "12", "8"]
        notes.append([])
        return Spy(notes[-1]), loader

    monkeypatch.setattr(resolutions, "start", start)
    config = of_cell(Namespace(sizes=[16, 12, 8]), method=method, seed=0, epochs=1, lr=1e-3)
    return notes, resolutions.train_one(loader.data, config, lambda _: None)


def test_every_step_and_the_test_see_each_size_and_are_told_it(loader, monkeypatch):
    (seen,), figures = trained(loader, "cn", monkeypatch)
    one = [((size, size), str(size)) for size in (16, 12, 8)]
    assert loader.batches_per_epoch == 3
    assert seen == 3 * one + one
    found = [figures[f"at_{size}"] for size in (16, 12, 8)]
    assert figures["mean"] == pytest.approx(sum(found) / 3)


def test_networks_alone_see_one_size_each(loader, monkeypatch):
    notes, _ = trained(loader, "bn-alone", monkeypatch)
    assert notes == [4 * [((size, size), str(size))] for size in (16, 12, 8)]


def test_smaller_images_are_averages_of_the_larger():
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 16, 16), nn.Identity()
    assert torch.equal(resolutions.at(model, x, 16), x)
    # Half the size with antialiasing: weights 1, 3, 3, 1 of eight along each side, inside.
    weights = torch.tensor([1.0, 3, 3, 1]) / 8
    expected = torch.einsum("ncij,i,j->nc", x[:, :, 5:9, 7:11], weights, weights)
    torch.testing.assert_close(resolutions.at(model, x, 8)[:, :, 3, 4], expected)


def test_the_smoke_setting_chooses_rates_and_reports_each_size(folder, tmp_path):
    (folder / "night").rename(folder / "train")
    (folder / "day").rename(folder / "test")
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    given = ["resolutions", "--smoke", "--tune", "--data", zipped, "--image-size", "24"]
    given += ["--methods", "bn", "cn-first", "--sizes", "24", "16"]
    assert main([*given, "--out", str(tmp_path / "runs"), "--name", "run"]) == 0

    tried = read_lines(tmp_path / "runs" / "run" / "results.jsonl")
    assert len(tried) == 2 * 3 + 2
    kept = json.loads((tmp_path / "runs" / "run" / "table.json").read_text())
    assert kept["figures"] == {"at_24": "24 px", "at_16": "16 px", "mean": "mean"}
    assert kept["compared"] == "mean"
