"""The command line, in this process: what it prints and how it exits."""

import json
import sys

import pytest

import normswap
from normswap.cli.main import main


def test_methods_lists_the_registry(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in normswap.methods())


def test_inspect_counts_every_norm_of_a_resnet50(capsys):
    assert main(["inspect", "resnet50", "--contexts", "4", "--rows", "3"]) == 0
    printed = capsys.readouterr().out
    assert "norms: 53 found, 53 replaced (53 threaded, 0 scoped" in printed
    assert "parameters of these layers: 53,120 -> 265,600" in printed
    assert "... and 50 more" in printed


def test_inspect_works_on_a_model_too_large_to_hold(capsys):
    assert main(["inspect", "regnety_2560", "--method", "cn", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"]
    assert {row["delivery"] for row in report["rows"]} == {"threaded"}


def test_inspect_takes_names_and_globs(capsys):
    arguments = ["inspect", "resnet18", "--contexts", "photo,sketch", "--select", "layer4*"]
    assert main([*arguments, "--format", "markdown"]) == 0
    printed = capsys.readouterr().out
    assert "2 context(s): photo, sketch" in printed
    assert "20 found, 5 replaced" in printed
    assert "not selected" in printed


def test_verify_prints_the_difference_for_every_context(capsys):
    assert main(["verify", "resnet10t", "--method", "cn", "--contexts", "photo,sketch"]) == 0
    assert "largest output difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "resnet1"], "timm has no model 'resnet1'; near: "),
        (["inspect", "resnet18", "--method", "cnx"], "did you mean 'cn-x'?"),
        (["inspect", "vit_tiny_patch16_224"], "found no norm to replace"),
        (["inspect", "resnet18", "--select", "nothing*"], "not selected"),
    ],
)
def test_errors_are_one_line_and_exit_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"normswap {normswap.__version__}\n"


def test_a_model_by_name_without_timm_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["inspect", "resnet18"]) == 2
    assert "pip install 'normswap[recipes]'" in capsys.readouterr().err


def test_unknown_command_exits_2():
    with pytest.raises(SystemExit, match="2"):
        main(["frobnicate"])
