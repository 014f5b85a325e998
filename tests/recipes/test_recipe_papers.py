import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from recipes import papers
from recipes.__main__ import main
from recipes.common.augment import Augmentation
from recipes.common.data import DomainData
from recipes.common.grid import read_lines

TINY = ["papers", "--smoke", "--methods"]


@pytest.fixture
def data() -> DomainData:
    """Twelve images of 8 px, in which every pixel is another."""
    images = torch.arange(12 * 8 * 8).remainder(251).to(torch.uint8).view(12, 8, 8, 1)
    images = images.repeat(1, 1, 1, 3)
    labels, no = torch.arange(12), torch.zeros(12, dtype=torch.bool)
    how = Augmentation(side=(1.0, 1.0), shift=4, flip=True)
    return DomainData(images, labels, labels % 3, ~no, no, [], ["0", "1", "2"], how)


def test_each_method_trains_at_the_rate_that_was_best_for_it(tmp_path):
    methods = ["cn", "cn-x-batch", "acn"]
    assert main([*TINY, *methods, "--out", str(tmp_path), "--name", "run"]) == 0

    results = read_lines(tmp_path / "run" / "results.jsonl")
    tried, final = results[:9], results[9:]
    assert [r["cell"]["method"] for r in final] == methods
    for record in final:
        mine = [r for r in tried if r["cell"]["method"] == record["cell"]["method"]]
        assert sorted(r["cell"]["lr"] for r in mine) == [3e-4, 1e-3, 3e-3]
        best = max(r["accuracy"] for r in mine)
        assert best in [r["accuracy"] for r in mine if r["rate"] == record["rate"]]
    assert "| acn " in (tmp_path / "run" / "report.txt").read_text()


def test_several_processes_find_what_one_finds(tmp_path):
    given = [*TINY, "bn", "cn-x", "--rates", "1e-3", "--out", str(tmp_path)]
    assert main([*given, "--name", "one"]) == 0
    assert main([*given, "--name", "two", "--jobs", "2"]) == 0

    def found(name):
        results = read_lines(tmp_path / name / "results.jsonl")
        return sorted((r["cell"]["method"], r["accuracy"], r["losses"]) for r in results)

    assert len(found("one")) == 2
    assert found("one") == found("two")


def test_a_resumed_run_trains_only_what_is_missing(tmp_path):
    given = [*TINY, "bn", "--rates", "1e-3", "--out", str(tmp_path), "--name", "run"]
    assert main(given) == 0
    (first,) = read_lines(tmp_path / "run" / "results.jsonl")
    assert main([*given[:3], "acn", *given[3:], "--resume"]) == 0

    kept, added = read_lines(tmp_path / "run" / "results.jsonl")
    assert kept == first
    assert added["cell"] == {"method": "acn", "seed": 0}


def test_a_zip_is_decoded_once(folder, tmp_path, monkeypatch):
    (folder / "night").rename(folder / "train")
    (folder / "day").rename(folder / "test")
    for path in folder.rglob("*.png"):  # pixels of one colour make no mixture of three
        noise = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = [*TINY, "bn", "--data", zipped, "--image-size", "16", "--batch-size", "4"]
    given += ["--rates", "1e-3"]
    assert main([*given, "--out", str(tmp_path / "runs")]) == 0

    monkeypatch.setattr("recipes.common.tiles.load", None)
    assert main([*given, "--out", str(tmp_path / "runs")]) == 0


def test_images_are_shifted_within_their_padding_and_mirrored(data):
    batches = list(papers.epoch_of(data, torch.arange(12), 5, seed=0, epoch=0))
    assert [len(x) for x, *_ in batches] == [5, 5]
    mirrored = 0
    for pixels, labels, contexts in batches:
        assert torch.equal(contexts, labels % 3)
        for got, label in zip(pixels, labels, strict=True):
            window = nn.functional.pad(data.images[label].permute(2, 0, 1), (4, 4, 4, 4))
            wanted = [
                (side, papers.ready(part.permute(1, 2, 0)[None])[0])
                for top in range(9)
                for left in range(9)
                for shown in [window[:, top : top + 8, left : left + 8]]
                for side, part in ((0, shown), (1, shown.flip(2)))
            ]
            matches = [side for side, image in wanted if torch.equal(image, got)]
            assert matches
            mirrored += matches[0]
    assert 0 < mirrored < 10


def test_seed_and_epoch_alone_decide_an_epoch(data):
    def order(seed, epoch):
        torch.randn(1)
        return torch.cat([x.flatten() for x, *_ in papers.epoch_of(data, every, 4, seed, epoch)])

    every = torch.arange(12)
    assert torch.equal(order(0, 0), order(0, 0))
    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))


def test_the_network_has_three_norms_of_which_one_is_named():
    model = papers.network(10, 8, 16)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ["norm1", "norm2", "norm3"]
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
