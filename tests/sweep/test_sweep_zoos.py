import json

import pytest

from tests.support.sampling import sampled
from tests.sweep.__main__ import main
from tests.sweep.smallest import KNOWN, smallest_members
from tests.sweep.test_sweep import results


@pytest.mark.exhaustive
def test_torchvision_is_a_source(tmp_path):
    out = tmp_path / "out"
    names = ["lraspp_mobilenet_v3_large", "raft_small", "alexnet"]
    assert main(["--source", "torchvision", "--out", str(out), "--filter", *names]) == 0
    found = {name: r for (name, _), r in results(out).items()}
    assert found["lraspp_mobilenet_v3_large"]["replaced"] == 47
    # Optical flow takes two images, and is written for float32.
    assert (found["raft_small"]["dtype"], found["raft_small"]["family"]) == (
        "float32",
        "optical_flow",
    )
    assert found["alexnet"]["status"] == "no norms"


def test_the_smallest_member_with_norms_stands_for_a_family():
    names = ["resnet34", "resnet18", "vit_tiny_patch16_224", "vgg11", "vgg13_bn"]
    assert smallest_members(names, 1, 60, float("inf")) == ["resnet18", "vgg13_bn"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "source", "name"),
    [
        ("transformers", "zoo_transformers:models", "PatchTSTForPrediction"),
        ("monai", "zoos:monai", "MultiScalePatchDiscriminator*"),
    ],
)
def test_models_of_other_libraries_are_run(tmp_path, capsys, library, source, name):
    pytest.importorskip(library)
    options = ["--source", f"tests.sweep.{source}", "--filter", name, "--out", str(tmp_path / "o")]
    code = main(options)
    assert code == 0, capsys.readouterr().out
    (record,) = results(tmp_path / "o").values()
    assert record["dtype"] == "float64"
    assert record["replaced"] > 0


SMALLEST = sorted(json.loads(KNOWN.read_text(encoding="utf-8"))["families"].values())


@pytest.mark.slow
@pytest.mark.parametrize("part", sampled(range(4), 1))
def test_architectures_of_every_family_of_timm_are_converted(tmp_path, capsys, part):
    names = SMALLEST[part::4]
    options = ["--structure", "--blocks", "1", "--workers", "1", "--memory-gb", "8"]
    code = main([*options, "--out", str(tmp_path / "out"), "--filter", *names])
    assert code == 0, capsys.readouterr().out
    assert len(results(tmp_path / "out")) == len(names)


# Of each way to build a block one: branches that are summed or joined, gates, attention, windows.
# All families, wider ones too, in exhaustive runs.
FAMILIES = ["test_byobnet", "test_coatnet", "test_efficientnet", "dla46x_c", "fasternet_t0"]
FAMILIES += ["mobilevit_xxs"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_architectures_of_many_families_convert_right(tmp_path, capsys):
    options = ["--blocks", "1", "--workers", "1", "--memory-gb", "8", "--out", str(tmp_path / "o")]
    code = main(["--filter", *FAMILIES, *options])
    assert code == 0, capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_one_architecture_of_every_family_of_timm_converts_right(tmp_path, capsys):
    out = tmp_path / "out"
    # Of equal blocks one: they are converted one by one.
    options = ["--smallest-per-family", "--blocks", "1", "--workers", "2", "--memory-gb", "8"]
    options += ["--out", str(out)]
    code = main([*options])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert len(results(out)) >= 59


WRONG_ONCE = ["shvit_s1", "dla46x_c", "ghostnet_050", "rexnet_100", "efficientvit_m0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(WRONG_ONCE, 1))
def test_models_that_other_methods_got_wrong_once(tmp_path, capsys, name):
    methods = ["--methods", "acn", "selfnorm", "--workers", "1", "--memory-gb", "8"]
    code = main(["--filter", name, *methods, "--out", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().out
