"""Saving what changed: small, whole or not there, and what comes back of it."""

import copy
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import CheckpointError
from normswap.saving.folder import DESCRIPTION
from tests.support.builders import SKEWED, trained_norm
from tests.support.models import NAMES, ConvNet, make_inputs, make_model, same, separate, train
from tests.support.saved import describe, make, tensors_in


def test_only_the_layers_are_written_while_nothing_else_was_trained(tmp_path):
    _, model = make()
    normswap.save(model, tmp_path)
    layers = ("stem.1", "blocks.0.bn", "blocks.1.bn", "neck")
    assert tensors_in(tmp_path) == {n for n in model.state_dict() if n.startswith(layers)}
    assert {"stem.1.running_mean", "neck.priors"} <= tensors_in(tmp_path)
    content = describe(tmp_path)
    assert content["contexts"] == NAMES
    assert content["method"] == "cn"
    assert content["priors"] == pytest.approx(SKEWED)
    assert content["base"]["norms"]["neck"]["class"] == "BatchNorm1d"


def test_a_trained_head_is_written_too_and_all_on_request(tmp_path):
    base, model = make()
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    normswap.save(model, tmp_path)
    assert {n for n in tensors_in(tmp_path) if "head" in n} == {"head.bias"}
    assert same(normswap.load(base, tmp_path).state_dict(), model.state_dict())
    normswap.save(model, tmp_path, state="all")
    assert tensors_in(tmp_path) == set(model.state_dict())
    other = ConvNet().eval()
    assert same(normswap.load(other, tmp_path).state_dict(), model.state_dict())
    normswap.save(model, tmp_path, state="norms")
    assert not any("head" in name for name in tensors_in(tmp_path))
    assert torch.equal(normswap.load(base, tmp_path).head.bias, base.head.bias)
    with pytest.raises(normswap.UnknownNameError, match="the choices are changed, norms, all"):
        normswap.save(model, tmp_path, state="everything")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "crossnorm", "p": 0.25, "active": 2},
        {"method": "cnsn", "placement": "pre", "crop": "both", "gates": 2},
        {"method": "cnsn", "crossnorm_at": "input"},
        {"method": "selfnorm", "placement": "norm"},
        {"method": "cnsn", "preset": "wideresnet-cifar10"},
        {"method": "acn", "components": 2, "statistics": "learned", "start": "jitter"},
        {"method": "cn", "contexts": 2, "placement": "input"},
        {"method": "cn-x", "contexts": ["pooled", "b"], "select": lambda n, _: "bn1" in n},
        {"method": "cn", "contexts": ["x", "y"], "unknown": "y", "exclude": "*layer1*"},
    ],
    ids=lambda s: "-".join(map(str, s.values()))[:40],
)
def test_every_setting_comes_back(settings, tmp_path):
    base = timm.create_model("resnet10t", num_classes=3).eval()
    model = train(normswap.convert(base, **settings, verify=False))
    normswap.save(model, tmp_path)
    twin = normswap.load(base, tmp_path)
    assert same(twin.state_dict(), model.state_dict())
    assert str(twin) == str(model)
    one, other = (normswap.summary(m) for m in (model, twin))
    for name in ("method", "options", "contexts", "priors", "unknown"):
        assert getattr(one, name) == getattr(other, name)
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(twin(x), model(x))
    schedules = [
        repr(vars(m).get("_normswap").schedule) for m in (model, twin) if "_normswap" in vars(m)
    ]
    assert len(set(schedules)) <= 1


def test_a_bare_norm_and_a_fused_activation_with_weights(tmp_path):
    norm = trained_norm()
    layer = separate(normswap.convert(norm, "cn", contexts=2))
    normswap.save(layer, tmp_path)
    assert same(normswap.load(norm, tmp_path).state_dict(), layer.state_dict())
    base = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU))
    model = normswap.convert(base.eval(), "cn-x", contexts=2)
    with torch.no_grad():
        model[1].act.weight.fill_(0.7)
    normswap.save(model, tmp_path)
    assert same(normswap.load(base, tmp_path).state_dict(), model.state_dict())


def test_inplace_and_otherwise(tmp_path):
    base, model = make()
    normswap.save(model, tmp_path)
    before = copy.deepcopy(base.state_dict())
    normswap.load(base, tmp_path)
    assert same(base.state_dict(), before)
    assert type(base) is ConvNet
    base.train().stem[1].eval()
    base.head.weight.requires_grad_(False)
    assert normswap.load(base, tmp_path, inplace=True) is base
    assert same(base.state_dict(), model.state_dict())
    assert [base.training, base.stem[1].training] == [True, False]
    assert not base.head.weight.requires_grad


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_a_model_that_was_cast_since_goes_onto_a_base_of_its_dtype(method, tmp_path):
    base, model = make(method)
    normswap.save(model.to(torch.bfloat16).eval(), tmp_path)
    x = make_inputs(base).to(torch.bfloat16)
    loaded = normswap.load(base.to(torch.bfloat16), tmp_path).eval()
    for given in ({"context": "a"}, {}):
        assert torch.equal(loaded(x, **given), model(x, **given))


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    _, model = make()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a folder to save to"):
        normswap.save(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(CheckpointError, match="it is without values"):
        normswap.save(copy.deepcopy(model).to("meta"), tmp_path / "meta")
    for library in ("numpy", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(normswap.NormswapError, match=r"pip install 'normswap\[save\]'"):
            normswap.save(model, tmp_path / "none")
        assert not (tmp_path / "none").exists()
        monkeypatch.undo()


def test_saving_again_leaves_one_file_of_each(tmp_path):
    _, model = make()
    (tmp_path / "notes.txt").write_text("mine")
    old = tmp_path / "tensors-0123456789abcdef.safetensors"
    old.write_bytes(b"left by a killed save")
    os.utime(old, (time.time() - 7200,) * 2)
    for _ in range(3):
        normswap.save(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def save_for_ever(folder, ready):
    torch.set_num_threads(1)
    _, model = make()
    turn = 0
    while True:
        turn += 1
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point() and tensor.dim() == 2:
                    tensor.fill_(turn)
        normswap.save(model, folder, state="all")
        if turn == 2:
            ready.set()


def test_killed_in_the_middle_the_save_before_is_whole(tmp_path):
    context = multiprocessing.get_context("forkserver")
    base, turns = make_model(), []
    for attempt in range(12):
        ready = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(0.003 * (attempt % 7) + 0.0007 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        values = {
            float(t.flatten()[0])
            for t in normswap.load(base, tmp_path).state_dict().values()
            if t.is_floating_point() and t.dim() == 2 and len(t.unique()) == 1
        }
        assert len(values) == 1, "tensors of two saves"
        turns.append(values.pop())
    assert max(turns) > 1
    assert make_inputs(base) is not None


@dataclass(frozen=True)
class OddOptions:
    table: Any = None


def test_options_of_a_method_go_through_json_or_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    method = normswap.get_method("crossnorm")
    monkeypatch.setattr(type(method), "options", OddOptions)
    monkeypatch.setattr(type(method), "insert", lambda self, place, options: nn.Identity())
    monkeypatch.setattr(type(method), "connect", lambda self, layers, options: None)
    base = make_model()
    model = normswap.convert(base, "crossnorm", table={2: (1, 2), 10: "é"})
    normswap.save(model, tmp_path)
    twin = normswap.load(base, tmp_path)
    assert normswap.summary(twin).options == {"table": {"2": [1, 2], "10": "é"}}
    model = normswap.convert(base, "crossnorm", table={1, 2})
    with pytest.raises(CheckpointError, match="options that JSON can hold"):
        normswap.save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "place", ["file", "file/below", "description", "nul\0", "x" * 300, None, 3]
)
def test_where_nothing_can_be_saved_is_an_error_of_the_package(place, tmp_path):
    _, model = make()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "description" / DESCRIPTION).mkdir(parents=True)
    folder = tmp_path / place if isinstance(place, str) else place
    with pytest.raises(CheckpointError, match=r"cannot save to|expected a folder"):
        normswap.save(model, folder)
    with pytest.raises(CheckpointError, match=r"cannot read|expected a folder"):
        normswap.load(model, folder)
    assert (tmp_path / "file").read_text() == "kept"
    assert [p.name for p in (tmp_path / "description").iterdir()] == [DESCRIPTION]


@pytest.mark.parametrize("bare", [False, True])
def test_a_loaded_model_spares_its_norms_from_decay_as_the_saved_one_does(bare, tmp_path):
    base = nn.BatchNorm2d(4) if bare else make_model()
    model = normswap.convert(base, "cn-x", contexts=2, verify=False)
    normswap.save(model, tmp_path)
    loaded = normswap.load(base, tmp_path)
    assert loaded.no_weight_decay() == model.no_weight_decay()
    assert copy.deepcopy(loaded).no_weight_decay() == model.no_weight_decay()
