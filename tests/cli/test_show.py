"""What `normswap show` says of a saved conversion."""

import pytest
from torch import nn

import normswap
from normswap.cli.main import main
from tests.support.saved import make, rewrite


def shown(capsys, folder):
    assert main(["show", str(folder)]) == 0
    lines = (line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    return {key.strip(): value.strip() for key, value in lines}


def test_a_saved_conversion_is_described_without_its_model(capsys, tmp_path):
    _, model = make(unknown="b")
    normswap.save(model, tmp_path)
    said = shown(capsys, tmp_path)
    assert said["base"].startswith("ConvNet, ")
    assert said["method"].startswith("cn, ")
    assert said["contexts"] == "3: a, b, c"
    assert said["unknown labels"] == "b"
    assert said["replaced"] == "3 BatchNorm2d, 1 BatchNorm1d"
    assert said["size"] == f"{sum(p.stat().st_size for p in tmp_path.iterdir()):,} bytes"
    assert said["saved by"].startswith("normswap ")
    assert said["read by"] == f"normswap {normswap.__version__}"


def test_of_inserted_layers_the_places_are_counted(capsys, tmp_path):
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(3)), "selfnorm", placement="norm")
    normswap.save(model, tmp_path)
    said = shown(capsys, tmp_path)
    assert "contexts" not in said
    assert said["replaced"] == "no norm"
    assert said["given a layer"] == "1 place(s)"
    assert said["placement"] == "norm"


def test_what_is_not_here_is_said(capsys, tmp_path):
    _, model = make()
    normswap.save(model, tmp_path)
    rewrite(tmp_path, method="of-another-package")
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.unlink()
    said = shown(capsys, tmp_path)
    assert said["method"].endswith("(not registered here)")
    assert said["size"].endswith(f"bytes; {tensors.name} is missing")


@pytest.mark.parametrize(("folder", "missing"), [("none", "folder {}"), (".", "{}/normswap.json")])
def test_any_other_folder_is_an_error_of_one_line(capsys, tmp_path, folder, missing):
    assert main(["show", str(tmp_path / folder)]) == 2
    expected = f"found no {missing.format(tmp_path / folder)}\n"
    assert capsys.readouterr().err.endswith(f"a folder that normswap.save wrote, {expected}")
