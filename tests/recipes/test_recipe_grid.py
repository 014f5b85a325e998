import json
from argparse import Namespace

import pytest

from recipes.common import grid, runs
from recipes.common.errors import RecipeError
from recipes.common.options import Parser


def options(tmp_path, *given: str) -> Namespace:
    parser = Parser("toy", "")
    parser.share(lr=0.1)
    grid.add_methods(parser, ["bn"], ["bn", "cn"], seeds=2)
    return runs.parse(parser, ["--out", str(tmp_path), *given])


CELLS = [{"method": method, "seed": seed} for method in ("bn", "cn") for seed in (0, 1)]


def train(cell, log):
    log({"epoch": 1, "loss": 0.5})
    return {"accuracy": 10.0 * len(cell["method"]) + cell["seed"]}


def test_a_stopped_grid_runs_only_what_is_missing(tmp_path):
    folder = grid.open_run(options(tmp_path), "toy")
    ran = []

    def stops(cell, log):
        ran.append(cell)
        if len(ran) == 3:
            log({"epoch": 1, "loss": 9.0})
            raise KeyboardInterrupt
        return train(cell, log)

    with pytest.raises(KeyboardInterrupt):
        grid.run_cells(folder, CELLS, stops)
    resumed = grid.open_run(options(tmp_path, "--name", folder.name, "--resume"), "toy")
    again = []
    records = grid.run_cells(resumed, CELLS, lambda c, log: again.append(c) or train(c, log))

    assert again == CELLS[2:]
    assert [record["cell"] for record in records] == CELLS
    assert grid.read_lines(folder / grid.RESULTS) == records
    # The epoch of the training that was stopped is of no result.
    assert [e["loss"] for e in grid.read_lines(folder / grid.EPOCHS)] == [0.5] * 4


def test_a_resumed_grid_may_have_more_seeds_and_methods(tmp_path):
    folder = grid.open_run(options(tmp_path), "toy")
    more = ("--name", folder.name, "--resume", "--seeds", "3", "--methods", "bn", "cn")

    assert grid.open_run(options(tmp_path, *more), "toy") == folder
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["seeds"] == 3
    assert settings["methods"] == ["bn", "cn"]


def test_results_of_methods_not_asked_for_are_kept(tmp_path):
    folder = grid.open_run(options(tmp_path), "toy")
    grid.run_cells(folder, CELLS, train)
    records = grid.run_cells(folder, CELLS[:1], train)

    assert [record["cell"] for record in records] == CELLS[:1]
    assert [record["cell"] for record in grid.read_lines(folder / grid.RESULTS)] == CELLS
    assert len(grid.read_lines(folder / grid.EPOCHS)) == len(CELLS)


def test_a_grid_of_other_settings_is_not_resumed(tmp_path):
    folder = grid.open_run(options(tmp_path), "toy")
    other = options(tmp_path, "--name", folder.name, "--resume", "--lr", "0.2")

    with pytest.raises(RecipeError, match=r"expected --lr to be 0\.1, .* got 0\.2"):
        grid.open_run(other, "toy")


def test_a_damaged_file_of_results_is_an_error(tmp_path):
    folder = grid.open_run(options(tmp_path), "toy")
    (folder / grid.RESULTS).write_text("{")

    with pytest.raises(RecipeError, match=r"cannot read .*results\.jsonl"):
        grid.run_cells(folder, CELLS, train)


def test_cells_are_all_methods_of_a_seed_together_and_of_one_seed_in_a_smoke_test(tmp_path):
    given = ("--methods", "bn", "cn")
    assert [tuple(cell.values()) for cell in grid.cells(options(tmp_path, *given))] == [
        ("bn", 0), ("cn", 0), ("bn", 1), ("cn", 1),
    ]  # fmt: skip
    assert grid.cells(options(tmp_path, *given, "--smoke")) == [CELLS[0], CELLS[2]]


def fails_once(cell, log):
    if cell == CELLS[1]:
        raise ValueError("of this training")
    return train(cell, log)


def test_processes_keep_what_went_well_and_raise_what_did_not(tmp_path):
    folder = grid.open_run(options(tmp_path), "toy")
    with pytest.raises(ValueError, match="of this training"):
        grid.run_cells(folder, CELLS, fails_once, jobs=2)

    kept = [record["cell"] for record in grid.read_lines(folder / grid.RESULTS)]
    assert sorted(map(str, kept)) == sorted(map(str, [CELLS[0], *CELLS[2:]]))
    records = grid.run_cells(folder, CELLS, train, jobs=2)
    assert [record["cell"] for record in records] == CELLS
    assert len(grid.read_lines(folder / grid.EPOCHS)) == len(CELLS)


def test_trainings_share_the_cores_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(grid.torch, "get_num_threads", lambda: 3)
    assert grid.jobs_of(options(tmp_path, "--device", "cpu")) == 3
    assert grid.jobs_of(options(tmp_path, "--device", "cpu", "--jobs", "2")) == 2
    assert grid.jobs_of(options(tmp_path, "--device", "cpu", "--smoke")) == 1
