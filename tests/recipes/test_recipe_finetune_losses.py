import pytest
import torch

from recipes import finetune
from recipes.__main__ import main
from tests.recipes.test_recipe_finetune import QUICK, assert_same_checkpoint


def run(out, *options: str) -> int:
    return main([*QUICK, "--out", str(out), *options])


def trained(folder, arm: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt")["states"][arm][0]


@pytest.mark.parametrize(
    ("loss", "method", "line"),
    [
        ("jsd", "cnsn", "Training loss: bn ce, cnsn jsd (the rest needs CrossNorm)."),
        (
            "augmix+jsd",
            "crossnorm",
            "Training loss: bn augmix, crossnorm augmix+jsd (the rest needs CrossNorm).",
        ),
        ("augmix", "cn", "Training loss: bn augmix, cn augmix."),
    ],
)
def test_a_run_says_its_losses_and_resumes_to_the_same_end(
    tmp_path, monkeypatch, loss, method, line
):
    options = ("--loss", loss, "--method", method)
    assert run(tmp_path, "--name", "whole", *options) == 0
    assert line in (tmp_path / "whole" / "report.txt").read_text(encoding="utf-8")
    train_and_test = finetune.train_and_test

    def interrupted(arms, loader, config, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_and_test(arms, loader, config, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_and_test", interrupted)
        assert run(tmp_path, "--name", "parts", *options) == 130
    assert main(["finetune", "--out", str(tmp_path), "--name", "parts", "--resume"]) == 0
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")


def test_the_baseline_beside_jsd_is_that_of_cross_entropy(tmp_path, capsys):
    for loss in ("ce", "jsd"):
        assert run(tmp_path, "--name", loss, "--loss", loss, "--method", "crossnorm") == 0
    for arm, expected in (("bn", True), ("crossnorm", False)):
        ce, jsd = (trained(tmp_path / loss, arm) for loss in ("ce", "jsd"))
        assert all(torch.equal(value, jsd[name]) for name, value in ce.items()) == expected
    # Another loss does not go on with it.
    assert run(tmp_path, "--name", "jsd", "--resume", "--loss", "ce") == 2
    assert "expected --loss to be 'jsd', as in the run" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["cn-x", "selfnorm"])
@pytest.mark.parametrize("loss", ["jsd", "augmix+jsd"])
def test_a_loss_that_needs_crossnorm_is_refused_before_anything_is_written(
    tmp_path, capsys, loss, method
):
    assert run(tmp_path / "out", "--loss", loss, "--method", method) == 2
    error = capsys.readouterr().err.strip()
    assert f"expected a --method with CrossNorm, such as crossnorm or cnsn, for --loss {loss}" in (
        error
    )
    assert "\n" not in error
    assert not (tmp_path / "out").exists()
