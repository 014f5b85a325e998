import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from skimage import data as pictures
from torch import nn

from recipes.common.errors import RecipeError
from recipes.common.weights import (
    load_efficientnet_lite0,
    load_weights,
    make_backbone,
    read_state_dict,
)


class Small(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.pretrained_cfg = {"classifier": "fc"}
        self.body = nn.Linear(2, width)
        self.fc = nn.Linear(width, classes)


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.fixture(scope="module")
def lite0():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    model.load_state_dict(load_efficientnet_lite0(), strict=False)
    return model.eval()


def test_efficientnet_lite0_fills_every_tensor_of_timms_model():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    missing, unexpected = model.load_state_dict(load_efficientnet_lite0(), strict=False)
    assert len(load_efficientnet_lite0()) == 247
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert unexpected == []


@pytest.mark.parametrize(
    ("picture", "label", "probability"), [("chelsea", 285, 0.41), ("coffee", 967, 0.94)]
)
def test_efficientnet_lite0_recognises_a_photograph(lite0, picture, label, probability):
    image = Image.fromarray(getattr(pictures, picture)())
    image = ImageOps.fit(image, (224, 224), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    with torch.inference_mode():
        probabilities = lite0(((pixels - 0.5) / 0.5)[None]).softmax(1)[0]
    assert probabilities.argmax() == label
    assert probabilities[label] == pytest.approx(probability, abs=0.03)


def test_matching_weights_are_all_loaded_in_silence():
    source, model = Small(), Small()
    assert load_weights(model, source.state_dict(), "FILE") == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_a_head_of_another_size_starts_at_zero_and_is_said_so():
    source, model = Small(classes=7), Small(classes=3)
    lines = load_weights(model, source.state_dict(), "FILE")
    assert not model.fc.weight.any()
    assert not model.fc.bias.any()
    assert torch.equal(model.body.weight, source.body.weight)
    assert [line.split()[1] for line in lines] == ["fc.weight", "fc.bias"]
    assert "(7, 4) in FILE, (3, 4) here" in lines[0]


def test_another_mismatch_is_refused_and_nothing_loaded():
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError, match=r"body\.weight is \(5, 2\) there and \(4, 2\)"):
        load_weights(model, Small(width=5).state_dict(), "FILE")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_tensor_is_refused():
    state = Small().state_dict()
    del state["body.bias"]
    with pytest.raises(RecipeError, match=r"body\.bias is missing there"):
        load_weights(Small(), state, "FILE")


def test_an_unexpected_tensor_is_refused():
    state = {**Small().state_dict(), "neck.weight": torch.zeros(1)}
    with pytest.raises(RecipeError, match=r"neck\.weight is \(1,\) there and missing in the model"):
        load_weights(Small(), state, "FILE")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_both_kinds_of_file_are_read(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = Small().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    read = read_state_dict(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_file_that_carries_code_is_refused_and_the_code_not_run(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"a": Payload()}, path)
    with pytest.raises(RecipeError, match="cannot read a state dict"):
        read_state_dict(path)
    assert "must not run" not in capsys.readouterr().out


def test_a_file_that_is_no_weights_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no weights at all")
    with pytest.raises(RecipeError, match="cannot read a state dict"):
        read_state_dict(path)


def test_a_new_head_on_downloaded_weights_starts_at_zero(monkeypatch):
    create = timm.create_model

    def downloads(name, pretrained, **settings):
        assert pretrained
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", downloads)
    model, notes = make_backbone("resnet10t", 7, pretrained=True)
    assert not model.fc.weight.any()
    assert model.conv1[0].weight.any()
    assert notes == ["the head, of 7 classes, starts at zero"]
    model, notes = make_backbone("resnet10t", 1000, pretrained=True)
    assert model.fc.weight.any()
    assert notes == []


def test_the_small_preactivation_network_normalises_before_each_convolution():
    model, _ = make_backbone("preact_resnet8", 10)
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(lambda m, _, out: seen.append((m, out.shape[-1])))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    kinds = "".join("n" if isinstance(m, nn.BatchNorm2d) else "c" for m, _ in seen)
    # Behind the stem; in two blocks the skip's convolution runs first; the head is a convolution.
    assert kinds == "c" + "ncnc" + "nccnc" * 2 + "nc"
    assert [size for _, size in seen] == [32] * 6 + [16] * 5 + [8] * 5 + [1]
