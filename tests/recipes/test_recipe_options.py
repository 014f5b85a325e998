import sys

import pytest

from recipes import corruptions, finetune
from recipes.__main__ import main
from recipes.common import images, runs
from recipes.common.errors import RecipeError
from recipes.common.options import ByData, Parser, count, resolve


def parser_of(add_options) -> Parser:
    parser = Parser("toy", "")
    add_options(parser)
    return parser


def tuned(*given: str):
    options = parser_of(finetune.add_options).parse_args(given)
    finetune.settle(options)
    return options


def mixed(*given: str):
    options = parser_of(corruptions.add_options).parse_args(given)
    images.settle(options)
    return options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "--epochs: expected 1 or more, got 0"),
        (["--batch-size", "-1"], "--batch-size: expected 1 or more, got -1"),
        (["--lr", "0"], "--lr: expected a number above 0, got 0"),
        (["--lr", "inf"], "--lr: expected a number above 0, got inf"),
        (["--lr", "nan"], "--lr: expected a number above 0, got nan"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--weight-decay", "-0.1"], "--weight-decay: expected 0 or more, got -0.1"),
        (["--drop-labels", "1.5"], r"--drop-labels: expected a number in \[0, 1\], got 1.5"),
        (["--pretrained", "--weights", "x"], "--pretrained or --weights, got both"),
        (["--method", "batchnorm"], "invalid choice: 'batchnorm'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        tuned(*given)


def test_given_weights_are_tuned_at_a_smaller_rate():
    assert tuned("--weights", "some.pth").lr < tuned().lr
    assert tuned("--weights", "some.pth", "--lr", "0.1").lr == 0.1


def test_weights_of_efficientnet_lite0_choose_its_model():
    assert tuned("--weights", "efficientnet-lite0").model == "tf_efficientnet_lite0"


def test_a_folder_has_other_defaults_than_the_digits():
    digits, folder = mixed(), mixed("--data", "somewhere")
    assert (digits.image_size, digits.model, digits.weights) == (24, "resnet10t", "none")
    assert (folder.image_size, folder.model) == (64, "tf_efficientnet_lite0")
    assert (folder.weights, folder.lr) == ("efficientnet-lite0", 3e-4)
    assert mixed("--data", "somewhere", "--weights", "none").lr == 2e-3


def test_a_folder_is_read_at_the_size_its_model_takes_unless_told():
    assert tuned("--data", "somewhere", "--model", "resnet18").image_size == 224
    assert (
        tuned("--data", "somewhere", "--model", "resnet18", "--image-size", "80").image_size == 80
    )


def test_a_smoke_test_is_small_whatever_was_asked_for():
    options = mixed("--smoke", "--epochs", "50")
    assert (options.epochs, options.seeds, options.limit) == (1, 1, 10)


def test_help_tells_defaults_where_there_are_some():
    text = parser_of(finetune.add_options).format_help()
    assert "32; with --data what the model" in text
    assert "(default: 0.002; from given" in text
    assert "None" not in text


def test_settled_options_are_settled():
    options = tuned("--smoke")
    before = dict(vars(options))
    finetune.settle(options)
    assert vars(options) == before


def resumed(tmp_path, *given: str):
    """Options of a run of three epochs at rate 0.01, resumed with some given anew."""
    run = tuned("--epochs", "3", "--lr", "0.01", "--out", str(tmp_path), "--name", "run")
    runs.write_config(tmp_path / "run", runs.settings_of(run, "finetune"))
    argv = ["--out", str(tmp_path), "--name", "run", "--resume", *given]
    options = runs.parse(parser_of(finetune.add_options), argv)
    finetune.settle(options)
    return run, options


def test_a_resumed_run_keeps_its_own_settings(tmp_path):
    run, options = resumed(tmp_path)
    assert runs.settings_of(options, "finetune") == runs.settings_of(run, "finetune")
    assert runs.folder_of(options, "finetune", "stem") == tmp_path / "run"


def test_resuming_with_another_setting_is_refused_with_both_values(tmp_path):
    _, options = resumed(tmp_path, "--lr", "0.02")
    with pytest.raises(RecipeError, match=r"expected --lr to be 0\.01, .* got 0\.02"):
        runs.folder_of(options, "finetune", "stem")


def test_resuming_with_other_workers_is_fine(tmp_path):
    _, options = resumed(tmp_path, "--workers", "1")
    runs.folder_of(options, "finetune", "stem")
    assert options.workers == 1


def test_another_recipe_does_not_resume_a_run(tmp_path):
    _, options = resumed(tmp_path)
    with pytest.raises(RecipeError, match=r"expected --recipe to be 'finetune'.* got 'domains'"):
        runs.folder_of(options, "domains", "stem")


def test_a_default_by_data_is_decided_by_the_data():
    shared = ("data", "weights", "model", "smoke")
    parser = parser_of(lambda parser: parser.share(*shared, lr=0.1, device="cpu"))
    parser.add_argument("--parts", type=count, default=ByData(2, 5))
    parser.add_argument("--image-size", default=24)
    for given, parts in (([], 2), (["--data", "here"], 5), (["--parts", "7"], 7)):
        options = parser.parse_args(given)
        resolve(options)
        assert options.parts == parts


def test_package_that_is_missing_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "recipes.common.runs")
    assert main(["sensors", "--smoke"]) == 2
    said = capsys.readouterr().err
    assert "needs the package 'timm'" in said
    assert "pip install -e '.[recipes]'" in said
