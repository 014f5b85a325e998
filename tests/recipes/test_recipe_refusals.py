"""What cannot be run is said in one line, before anything is written."""

import pytest

from recipes.__main__ import main

SMALL = ["--smoke", "--model", "test_resnet", "--image-size", "16"]
# By recipe what is given beside it, FOLDER and SITES for those of fixtures, and a part of the line.
CASES = [
    ("finetune", ["--data", "nowhere"], "expected --data to be a folder"),
    ("finetune", ["--held-out", "45"], "one of the domains 0, 30, 60, 90, got '45'"),
    ("finetune", ["--model", "resnet51"], "a name timm knows, got 'resnet51'; did you mean"),
    ("finetune", ["--weights", "none.pth"], "found no file at none.pth"),
    ("finetune", ["--device", "abacus"], "expected --device to be usable, got 'abacus'"),
    ("finetune", ["--epochs", "0"], "--epochs: expected 1 or more"),
    ("finetune", ["--resume"], "expected --name with --resume"),
    ("finetune", ["--resume", "--name", "none"], "expected a run to resume"),
    ("finetune", ["--weights", "efficientnet-lite0"], "expected the weights of this model"),
    ("finetune", ["--model", "test_vit"], "found no norm to replace"),
    ("finetune", ["--model", "edgenext_xx_small"], "cannot take images of 16 px"),
    ("finetune", ["--loss", "jsd"], "with CrossNorm, such as crossnorm or cnsn, for --loss jsd"),
    ("finetune", ["--loss", "augmix+jsd", "--method", "selfnorm"], "a --method with CrossNorm"),
    ("domains", ["--held-out", "45"], "0, 30, 60, 90, got '45'"),
    ("domains", ["--joint", "--held-out", "0"], "--joint or --held-out, got both (0)"),
    ("domains", ["--weights", "none.pth"], "found no file at none.pth"),
    ("domains", ["--model", "vgg11_bn"], "cannot take images of 16 px"),
    ("fixmatch", ["--labels", "90"], "expected --labels of at most"),
    ("fixmatch", ["--ema", "1"], "--ema: expected a number in [0, 1)"),
    ("fixmatch", ["--methods", "xx"], "invalid choice: 'xx'"),
    ("fixmatch", ["--image-size", "8"], "expected --image-size of at least 16"),
    ("fixmatch", ["--model", "vit_tiny_patch16_224"], "set another --image-size"),
    ("adaptation", ["--source", "30", "--target", "30"], "two domains"),
    ("adaptation", ["--source", "photo"], "angles"),
    ("adaptation", ["--data", "FOLDER", "--source", "night"], "two domains"),
    ("adaptation", ["--data", "FOLDER", "--source", "day", "--target", "dusk"], "got 'dusk'"),
    ("corruptions", ["--weights", "efficientnet-lite0"], "expected the weights of this model"),
    ("superclasses", ["--superclasses", "a=0,6,8,9"], "found none for 1, 2, 3, 4, 5, 7"),
    ("segment", ["--source", "nowhere"], "expected domains among gravel"),
    ("segment", ["--source", "brick", "--target", "brick"], "expected each domain once"),
    ("segment", ["--image-size", "16"], "at least 32"),
    ("segment", ["--model", "resnet10"], "did you mean"),
    ("segment", ["--image-size", "32", "--levels", "1", "9"], "gives no feature maps"),
    ("segment", ["--image-size", "32", "--model", "vit_tiny_patch16_224"], "gives no feature maps"),
    ("multisite", ["--data", "SITES", "--adapt", "north"], "the sites east, west, got 'north'"),
    ("multisite", ["--data", "SITES", "--levels", "1", "9"], "gives no feature maps"),
]
# Without options of a model.
BARE = [
    ("adversarial", ["--eps", "0"], "--eps: expected a number above 0"),
    ("corruptions", ["--train-per-class", "500"], "expected --train-per-class of at most"),
    ("generate", ["--lr", "0"], "--lr: expected a number above 0"),
    ("papers", ["--rates", "1e-3", "nan"], "--rates: expected a number above 0, got nan"),
    ("resolutions", ["--sizes", "16"], "expected --sizes to be two or more, each another"),
    ("resolutions", ["--sizes", "16", "16"], "expected --sizes to be two or more, each another"),
    ("resolutions", ["--sizes", "32", "16"], "expected --sizes to be two or more, each another"),
    ("sensors", ["--lr", "inf"], "--lr: expected a number above 0, got inf"),
    ("sensors", ["--data", "FOLDER"], "the folders train and test, of CLASS/image, got day"),
    ("sentiment", ["--data", "FOLDER"], "stsa.binary.train.txt"),
    ("sentiment", [], "expected --data, a folder with stsa.binary.train.txt"),
    ("multisite", [], "expected --data, a folder or zip SITE"),
    ("segment", ["--smoke", "--model", "vgg11_bn", "--methods", "selfnorm"], "placement='norm'"),
    (
        "multisite",
        ["--data", "SITES", "--smoke", "--adapt", "east", "--methods", "bn-frozen"],
        "methods that adapt",
    ),
]


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [*((recipe, [*SMALL, *given], message) for recipe, given, message in CASES), *BARE],
)
def test_what_cannot_be_run_is_said_before_a_run_is_made(
    recipe, given, message, folder, sites, tmp_path, capsys
):
    places = {"FOLDER": str(folder), "SITES": str(sites)}
    given = [places.get(word, word) for word in given]
    assert main([recipe, *given, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--method nothing", "invalid choice: 'nothing' (choose from"),
        ("--batch 0", "--batch: expected 1 or more, got 0"),
        ("--model no_such_model", "got 'no_such_model'"),
    ],
)
def test_wrong_arguments_of_bench_are_refused(given, message, capsys):
    assert main(["bench", *given.split()]) == 2
    assert message in capsys.readouterr().err
