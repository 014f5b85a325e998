"""Loading refuses another base, and folders that are spoilt, and runs nothing of theirs."""

import copy
import hashlib
import os
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap import CheckpointError, ConversionError
from normswap.saving.folder import DESCRIPTION, FORMAT
from tests.support.models import ConvNet, make_model, same
from tests.support.saved import describe, make, rewrite


def another_class():
    class ConvNet2(ConvNet):
        pass

    return ConvNet2()


def wider():
    base = make_model()
    base.head = nn.Linear(4, 9)
    return base


def without_a_norm():
    base = make_model()
    base.neck = nn.Identity()
    return base


def other_norm():
    base = make_model()
    base.stem[1] = nn.InstanceNorm2d(4)
    return base


def more():
    base = make_model()
    base.extra = nn.Linear(2, 2)
    return base


def other_values():
    base = make_model()
    base.stem[0].weight.data[0, 0] += 1e-3
    return base


WRONG = [
    (another_class, "the model is a ConvNet there, a ConvNet2 here"),
    (wider, r"head\.weight: float32 \(5, 4\) there, float32 \(9, 4\) here"),
    (without_a_norm, r"neck: BatchNorm1d\(.* there, Identity\(\) here"),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3)),
        r"blocks\.0\.bn: not in this model; .* and \d+ more",
    ),
    (other_norm, r"stem\.1: BatchNorm2d\(weight .* there, InstanceNorm2d\(\) here"),
    (more, r"extra\.weight: not in the saved one"),
    (lambda: make_model().half(), "float16"),
    (other_values, r"1 tensors have other values: stem\.0\.weight"),
]


@pytest.mark.parametrize(("make_base", "match"), WRONG)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_base_is_refused_by_what_differs(make_base, match, inplace, tmp_path):
    _, model = make()
    normswap.save(model, tmp_path)
    base = make_base()
    before, kind = copy.deepcopy(base.state_dict()), type(base)
    with pytest.raises(CheckpointError, match=match):
        normswap.load(base, tmp_path, inplace=inplace)
    assert same(base.state_dict(), before)
    assert type(base) is kind
    assert not any(isinstance(m, normswap.ContextNorm) for m in base.modules())


def test_other_values_on_request(tmp_path):
    _, model = make()
    normswap.save(model, tmp_path)
    twin = normswap.load(other_values(), tmp_path, check_values=False)
    assert torch.equal(twin.stem[0].weight, other_values().stem[0].weight)
    assert torch.equal(twin.neck.weight, model.neck.weight)


def test_a_converted_base_is_refused(tmp_path):
    _, model = make()
    normswap.save(model, tmp_path)
    with pytest.raises(ConversionError, match="is converted already"):
        normswap.load(model, tmp_path)
    with pytest.raises(ConversionError, match="expected a converted model"):
        normswap.save(make_model(), tmp_path)


def test_cut_short_at_any_byte_nothing_is_loaded(tmp_path):
    norm = nn.BatchNorm1d(2)
    layer = normswap.convert(norm, "cn", contexts=2)
    normswap.save(layer, tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError):
                normswap.load(norm, tmp_path)
        path.write_bytes(whole)
    normswap.load(norm, tmp_path)


def test_changed_at_any_byte_nothing_is_loaded(tmp_path):
    norm = nn.BatchNorm1d(2)
    normswap.save(normswap.convert(norm, "cn", contexts=2), tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            if whole[place : place + 1].isspace():
                continue
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                normswap.load(norm, tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda d: (d / DESCRIPTION).unlink(), r"found no .*normswap\.json"),
        (lambda d: next(d.glob("*.safetensors")).unlink(), "which names it; copy both"),
        (lambda d: (d / DESCRIPTION).write_text("[]"), "is not a description"),
        (lambda d: (d / DESCRIPTION).write_text("{}"), "is not a description"),
        (lambda d: (d / DESCRIPTION).write_text("{nonsense"), "cannot read"),
        (lambda d: (d / DESCRIPTION).write_text("[" * 100_000), "cannot read"),
        (lambda d: (d / DESCRIPTION).write_bytes(b"\xff\xfe\x00"), "cannot read"),
        (lambda d: rewrite(d, format=FORMAT + 1), "knows formats up to 3: upgrade normswap"),
        (lambda d: rewrite(d, format=True), "is not a description"),
        (lambda d: rewrite(d, file={**describe(d)["file"], "name": "../x"}), "of another kind"),
        (lambda d: rewrite(d, file=None), "expected 'file' as a name, bytes and sha256"),
        (lambda d: rewrite(d, base={"class": "Net"}), "expected 'base' as a class, norms and"),
        (lambda d: rewrite(d, contexts=["a", "a", "b"]), "expected 'contexts' as distinct names"),
        (lambda d: rewrite(d, contexts=["a"]), "expected 1 priors, one a context, got 3"),
        (lambda d: rewrite(d, priors=[0.5, -1.0, 1.5]), "expected 'priors' as positive numbers"),
        (lambda d: rewrite(d, eps={"stem.1": -1.0}), "expected 'eps' as numbers by name"),
        (lambda d: rewrite(d, eps={"head": 1.0}), "names layers that its base has not: head"),
        (lambda d: rewrite(d, unknown=3), "expected 'unknown' as one of 3 contexts, got 3"),
        (lambda d: rewrite(d, answering=4), "expected 'answering' as up to 3 contexts, got 4"),
        (lambda d: rewrite(d, others=["nowhere"]), "names tensors that its base has not: nowhere"),
        (lambda d: rewrite(d, values={"nowhere": 1}), "names tensors that its base has not"),
        (lambda d: ((d / DESCRIPTION).unlink(), (d / DESCRIPTION).mkdir()), "cannot read"),
    ],
)
def test_spoilt_folders(spoil, match, tmp_path):
    base, model = make()
    normswap.save(model, tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        normswap.load(base, tmp_path)


def test_a_method_that_is_not_registered_is_named(tmp_path):
    base, model = make()
    normswap.save(model, tmp_path)
    rewrite(tmp_path, method="mine")
    with pytest.raises(normswap.UnknownNameError, match="'mine', which is not registered here"):
        normswap.load(base, tmp_path)
    rewrite(tmp_path, method="cn", options={"size": 1})
    with pytest.raises(ConversionError, match="unknown option size"):
        normswap.load(base, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("which", [DESCRIPTION, "tensors"])
def test_a_named_pipe_is_not_waited_for(tmp_path, which):
    base, model = make()
    normswap.save(model, tmp_path)
    path = next(tmp_path.glob("*.safetensors")) if which == "tensors" else tmp_path / which
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="no regular file"):
        normswap.load(base, tmp_path)


@pytest.mark.parametrize("which", [DESCRIPTION, "tensors"])
def test_a_huge_file_is_not_read(tmp_path, which):
    base, model = make()
    normswap.save(model, tmp_path)
    path = next(tmp_path.glob("*.safetensors")) if which == "tensors" else tmp_path / which
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match=r"more than the .* expected"):
        normswap.load(base, tmp_path)


def test_saving_over_a_description_that_is_a_pipe_or_huge_works(tmp_path):
    _, model = make()
    (tmp_path / DESCRIPTION).touch()
    os.truncate(tmp_path / DESCRIPTION, 1 << 40)
    normswap.save(model, tmp_path)
    assert describe(tmp_path)["method"]


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, model = make()
    normswap.save(model, tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    data = pickle.dumps(Bomb())
    path.write_bytes(data)
    named = {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(tmp_path / "saved", file=named)
    with pytest.raises(CheckpointError, match="does not read as safetensors"):
        normswap.load(base, tmp_path / "saved")
    assert not (tmp_path / "exploded").exists()
