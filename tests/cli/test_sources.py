"""Models of the command line that are not timm's: torchvision, transformers, functions."""

import json
import sys

import pytest
import torch
from torch import nn

from normswap.cli.main import main
from normswap.cli.sources import build_model

RESNET = {
    "architectures": ["ResNetForImageClassification"],
    "depths": [1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "layer_type": "basic",
    "model_type": "resnet",
}


def builds_a_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def returns_none():
    return None


def takes_a_width(width):
    return nn.BatchNorm2d(width)


@pytest.fixture
def configuration(tmp_path):
    """Write a small model's configuration, and return its folder."""
    (tmp_path / "config.json").write_text(json.dumps(RESNET))
    return tmp_path


def test_torchvisions_models_are_inspected_without_weights(capsys):
    arguments = ["inspect", "--source", "torchvision:resnet50", "--contexts", "4"]
    assert main(arguments) == 0
    assert "ResNet: cn-x" in (printed := capsys.readouterr().out)
    assert "norms: 53 found, 53 replaced (53 threaded, 0 scoped" in printed


def test_torchvisions_segmenters_fetch_no_backbone(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    model = build_model("torchvision:lraspp_mobilenet_v3_large", "meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_functions_model_is_inspected(capsys):
    assert main(["inspect", "--source", f"{__name__}:builds_a_norm", "--method", "cn"]) == 0
    assert "norms: 1 found, 1 replaced" in capsys.readouterr().out


def test_a_function_is_found_in_the_working_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_models.py").write_text("import torch\nbuild = lambda: torch.nn.BatchNorm1d(3)")
    assert main(["verify", "--source", "own_models:build", "--contexts", "2"]) == 0
    assert "norms: 1 found, 1 replaced" in capsys.readouterr().out


def test_a_source_may_name_a_model_of_timm(capsys):
    assert main(["inspect", "--source", "timm:resnet18", "--rows", "0"]) == 0
    assert "norms: 20 found" in capsys.readouterr().out


def test_a_configuration_of_transformers_is_enough(capsys, configuration):
    pytest.importorskip("transformers")
    assert main(["inspect", "--source", f"transformers:{configuration}"]) == 0
    assert "ResNetForImageClassification: cn-x" in (printed := capsys.readouterr().out)
    assert "norms: 6 found, 6 replaced" in printed


def test_without_its_class_a_configuration_gives_the_backbone(configuration):
    pytest.importorskip("transformers")
    (configuration / "config.json").write_text(json.dumps({**RESNET, "architectures": None}))
    assert type(build_model(f"transformers:{configuration}", "meta")).__name__ == "ResNetModel"


def test_a_folder_without_a_configuration_is_one_line(capsys, tmp_path):
    pytest.importorskip("transformers")
    assert main(["inspect", "--source", f"transformers:{tmp_path}"]) == 2
    captured = capsys.readouterr()
    assert f"cannot read a configuration from '{tmp_path}'" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("library", ["transformers", "torchvision"])
def test_a_library_that_is_missing_is_named_with_its_install(capsys, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    extra = "transformers" if library == "transformers" else "recipes"
    assert main(["inspect", "--source", f"{library}:resnet50"]) == 2
    assert f"pip install 'normswap[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet50", "expected --source as timm:NAME"),
        ("torchvision:", "expected --source as timm:NAME"),
        ("torchvision:resnet5", "unknown model of torchvision 'resnet5'"),
        ("torchvision:resnet5", "did you mean 'resnet50'?"),
        ("nothing.here:build", "No module named 'nothing'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:returns_none", "returns_none to return a model, got None"),
        (f"{__name__}:takes_a_width", "as a function called as function(), got"),
    ],
)
def test_other_sources_are_one_line_and_exit_2(capsys, source, message):
    assert main(["inspect", "--source", source]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("given", [[], ["resnet18", "--source", "timm:resnet18"]])
def test_one_model_is_asked_for(capsys, given):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", *given])
    assert "model" in capsys.readouterr().err
