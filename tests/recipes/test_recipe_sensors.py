import json
import shutil
from argparse import Namespace

import pytest
import torch

from recipes.__main__ import main
from recipes.common import scores, tiles
from recipes.common.grid import read_lines
from recipes.sensors import SENSORS, sense


@pytest.fixture
def split(folder):
    """The folder of the recipes' tests with the names of a split for those of its domains."""
    (folder / "night").rename(folder / "train")
    (folder / "day").rename(folder / "test")
    return folder


def test_the_smoke_setting_chooses_rates_and_tells_every_sensor(tmp_path):
    given = ["sensors", "--smoke", "--tune", "--methods", "bn", "cn-first", "cn-x-batch"]
    assert main([*given, "--out", str(tmp_path), "--name", "run"]) == 0

    results = read_lines(tmp_path / "run" / "results.jsonl")
    tried, final = results[:9], results[9:]
    rates = [2e-3 / 3, 2e-3, 6e-3]
    assert [r["cell"]["lr"] for r in tried] == pytest.approx(rates * 3)
    for record in final:
        known = {
            r["rate"]: scores.known_mean(r)
            for r in tried
            if r["cell"]["method"] == record["cell"]["method"]
        }
        assert known[record["rate"]] == max(known.values())
    told = {"known", "pooled", "posterior", "most confident"}
    assert [set(r["accuracy"]) for r in final] == [{""}, told, told]
    assert all(set(a) == set(SENSORS) for r in final for a in r["accuracy"].values())
    assert "above bn" in (tmp_path / "run" / "report.txt").read_text()


def test_a_zip_trains_on_its_train_and_tests_on_its_test(split, tmp_path):
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", split)
    given = ["--smoke", "--data", zipped, "--image-size", "16", "--methods", "bn", "cn"]
    assert main(["sensors", *given, "--out", str(tmp_path / "runs")]) == 0

    data = tiles.load(Namespace(data=split, image_size=16, limit=None), seed=0)
    assert data.images[data.train, 0].unique().tolist() == [50]
    assert data.images[data.test, 0].unique().tolist() == [100]


def test_domains_with_a_split_are_the_contexts(split, tmp_path):
    for domain in ("day", "night"):
        shutil.copytree(split, tmp_path / "domains" / domain)
    given = ["--smoke", "--data", str(tmp_path / "domains"), "--image-size", "16", "--no-flip"]
    given += ["--methods", "bn", "cn", "cn-x", "--name", "run", "--out", str(tmp_path / "runs")]
    assert main(["sensors", *given]) == 0

    results = read_lines(tmp_path / "runs" / "run" / "results.jsonl")
    found = [accuracy for r in results for accuracy in r["accuracy"].values()]
    assert len(found) == 9
    assert all(set(accuracy) == {"day", "night"} for accuracy in found)


def test_no_pixel_of_a_tile_that_tests_is_trained_on():
    data = tiles.tiles(16, seed=0, limit=5)
    assert data.images.shape == (120, 3, 16, 16)
    assert torch.equal(data.labels[data.train].bincount(), torch.full((12,), 5))
    assert torch.equal(data.labels[data.test].bincount(), torch.full((12,), 5))
    assert len(data.images.flatten(1).unique(dim=0)) == len(data.images)


def test_sensors_see_what_their_formulas_say():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (2, 3, 6, 6), generator=generator, dtype=torch.uint8)
    grey = pictures.double().mean(1)
    wanted = torch.empty(2, 6, 6, dtype=torch.float64)
    for n in range(2):
        for y in range(6):
            for x in range(6):
                across = down = 0.0
                for d, weight in ((-1, 1), (0, 2), (1, 1)):
                    near, far, this = (min(max(at, 0), 5) for at in (x - 1, x + 1, y + d))
                    across += weight * (grey[n, this, far] - grey[n, this, near])
                    near, far, this = (min(max(at, 0), 5) for at in (y - 1, y + 1, x + d))
                    down += weight * (grey[n, far, this] - grey[n, near, this])
                wanted[n, y, x] = (across**2 + down**2) ** 0.5 / 4
    seen = {name: sense(pictures, name, generator) for name in SENSORS}
    assert torch.equal(seen["colour"], pictures)
    for channel in range(3):
        off = seen["edges"][:, channel] - wanted.clamp(max=255)
        assert off.abs().max() <= 0.5001
        assert (seen["infrared"][:, channel] - (255 - grey)).abs().max() <= 0.5001
    assert seen["night"].float().mean() < 0.5 * pictures.float().mean()


def test_every_answer_of_a_training_is_a_row():
    def record(method, accuracy):
        return {"cell": {"method": method, "seed": 0}, "accuracy": accuracy, "rate": 2.0}

    told = {"colour": 30.0, "night": 40.0}
    rows = scores.rows_by_told([
        record("bn", {"": {"colour": 10.0, "night": 20.0}}),
        record("cn", {scores.KNOWN: told, "pooled": {"colour": 1.0, "night": 3.0}}),
    ])  # fmt: skip
    assert [(r["cell"]["method"], r["mean"]) for r in rows] == [
        ("bn", 15), (f"cn, {scores.KNOWN}", 35), ("cn, pooled", 2),
    ]  # fmt: skip


def test_given_weights_are_of_their_model_and_have_a_rate_of_their_own(tmp_path):
    given = ["sensors", "--smoke", "--weights", "efficientnet-lite0"]
    given += ["--methods", "cn-first-frozen", "--name", "run"]
    assert main([*given, "--out", str(tmp_path)]) == 0

    (result,) = read_lines(tmp_path / "run" / "results.jsonl")
    assert scores.KNOWN in result["accuracy"]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["model"], settings["lr"]) == ("tf_efficientnet_lite0", 5e-4)
