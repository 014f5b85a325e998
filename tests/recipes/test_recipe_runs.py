import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recipes.common import runs
from recipes.common.errors import RecipeError
from recipes.common.options import of_cell
from recipes.common.training import make_arm

CONFIG = of_cell(Namespace(epochs=2, lr=1e-3))
HISTORY = [{"epoch": 1, "arms": {}}]


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def trained_arm(steps: int = 3):
    """A small model some steps into training, so that the optimizer has a state."""
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    arm = make_arm("bn", model, CONFIG, 20)
    for update in range(steps):
        arm.schedule.step_update(update)
        model(torch.randn(5, 3)).pow(2).sum().backward()
        arm.optimizer.step()
    return arm


def state_of(arm):
    return arm.model.state_dict(), arm.optimizer.state_dict()


def assert_same(first, second):
    """Compare nested states bit by bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with runs.atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_write_that_is_stopped_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with runs.atomic(path) as temporary:
            temporary.write_text("ne")
            raise stop

    with pytest.raises(stop):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_restores_model_optimizer_and_history(tmp_path):
    saved, restored = trained_arm(steps=3), trained_arm(steps=1)
    runs.save_checkpoint(tmp_path, [saved], HISTORY)
    assert runs.load_checkpoint(tmp_path, [restored]) == HISTORY
    assert_same(state_of(saved), state_of(restored))


def test_the_old_checkpoint_survives_a_kill_while_the_next_is_written(tmp_path):
    saved, restored = trained_arm(steps=3), trained_arm(steps=1)
    runs.save_checkpoint(tmp_path, [saved], HISTORY)
    whole = (tmp_path / runs.CHECKPOINT).read_bytes()
    # What a kill leaves: a part of the next file, at the place it is written to.
    with runs.atomic(tmp_path / runs.CHECKPOINT) as temporary:
        where = temporary
        temporary.write_bytes(whole)
    where.write_bytes(whole[: len(whole) // 2])
    assert runs.load_checkpoint(tmp_path, [restored]) == HISTORY
    assert_same(state_of(saved), state_of(restored))


def test_remains_of_a_killed_write_do_not_hinder_the_next(tmp_path):
    runs.save_checkpoint(tmp_path, [trained_arm()], HISTORY)
    (tmp_path / f"{runs.CHECKPOINT}.tmp").write_bytes(b"half")
    saved, restored = trained_arm(steps=4), trained_arm(steps=1)
    runs.save_checkpoint(tmp_path, [saved], HISTORY)
    runs.load_checkpoint(tmp_path, [restored])
    assert_same(state_of(saved), state_of(restored))


def test_a_tensor_under_two_names_is_saved_under_both(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.append(model[0])
    runs.save_model(tmp_path, model)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["0.weight"], saved["2.weight"])


def test_metrics_are_one_json_line_an_epoch(tmp_path):
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    runs.save_checkpoint(tmp_path, [trained_arm()], history)
    lines = (tmp_path / runs.METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / runs.CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(RecipeError, match=r"cannot read the checkpoint .*checkpoint\.pt"):
        runs.load_checkpoint(tmp_path, [trained_arm()])


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_not_run(tmp_path, capsys):
    torch.save({"format": runs.FORMAT, "states": Payload()}, tmp_path / runs.CHECKPOINT)
    with pytest.raises(RecipeError, match="cannot read the checkpoint"):
        runs.load_checkpoint(tmp_path, [trained_arm()])
    assert "must not run" not in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    runs.save_checkpoint(tmp_path, [trained_arm()], HISTORY)
    other = make_arm("bn", nn.Linear(2, 2), CONFIG, 20)
    with pytest.raises(RecipeError, match="does not fit the model bn"):
        runs.load_checkpoint(tmp_path, [other])


def test_settings_of_a_run_are_read_back(tmp_path):
    runs.write_config(tmp_path / "run", {"epochs": 3, "held_out": "60"})
    assert runs.read_config(tmp_path / "run") == {"epochs": 3, "held_out": "60"}
    assert "torch" in runs.read_config(tmp_path / "run", "versions")


def test_a_default_name_avoids_existing_runs(tmp_path):
    options = Namespace(out=tmp_path, name=None, resume=False)
    for name in ("run", "run-2", "run-3"):
        folder = runs.folder_of(options, "toy", "run")
        assert folder == tmp_path / name
        folder.mkdir()
