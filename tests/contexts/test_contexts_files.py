"""Assigners on disk: what was saved labels alike, what was not saved by us is refused."""

import json
import math
import os
import time
import warnings

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError, ContextWarning, contexts
from normswap.contexts import store
from normswap.util import whole_file

X = torch.cat([torch.randn(120, 4, generator=torch.Generator().manual_seed(k)) + k for k in (0, 9)])
SURROGATE = os.fsdecode(b"caf\xe9")


def embed(x):
    return x[:, :2] * 3


def make_folders(tmp_path):
    for name in ("photo", "写真", SURROGATE):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").touch()
    return contexts.from_folders(tmp_path / "data")


MAKERS = {
    "folders": (make_folders, ["/x/写真/1.png", "/x/photo/1.png", f"/{SURROGATE}/1.png", "no"], {}),
    "superclasses": (lambda _: contexts.from_superclasses("cifar100"), torch.arange(-1, 101), {}),
    "indices": (lambda _: contexts.from_superclasses({3: "a", 5: "b"}), [5, 3, 1], {}),
    "columns": (
        lambda _: contexts.from_columns(
            [{"a": "x", "b": v} for v in range(9)], ["a", "b"], {"b": 3}
        ),
        [{"a": "x", "b": 7.5}, {"a": "y", "b": 1}],
        {},
    ),
    "kmeans": (lambda _: contexts.kmeans([X], 2), X, {}),
    "gaussian_mixture": (lambda _: contexts.gaussian_mixture([X], 2), X, {}),
    "function": (lambda _: contexts.kmeans([X], 2, features=embed), X, {"features": embed}),
}


def make(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)
        return MAKERS[kind][0](tmp_path)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_loaded_labels_and_reports_as_what_was_saved(kind, tmp_path):
    assigner = make(kind, tmp_path)
    assigner.save(tmp_path / "deep" / "saved")
    loaded = contexts.load(tmp_path / "deep" / "saved", **MAKERS[kind][2])
    batch = MAKERS[kind][1]
    assert torch.equal(loaded(batch), assigner(batch))
    assert loaded.names == assigner.names
    assert loaded.report() == assigner.report()
    assert torch.equal(loaded.priors, assigner.priors)


@pytest.mark.parametrize("kind", ["kmeans", "superclasses"])
def test_no_pickle_is_written(kind, tmp_path):
    make(kind, tmp_path).save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


def test_saving_again_replaces_everything(tmp_path):
    contexts.kmeans([X], 2).save(tmp_path)
    left = tmp_path / "contexts.json.7.tmp"
    left.write_text("of a killed process")
    os.utime(left, (time.time() - 7200,) * 2)
    second = contexts.gaussian_mixture([X], 2)
    second.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert type(contexts.load(tmp_path)) is type(second)


def test_files_of_a_save_under_way_in_another_process_are_spared(tmp_path):
    theirs = {"contexts-0123456789abcdef.safetensors", f".contexts.json.{'0' * 16}.tmp"}
    for name in theirs:
        (tmp_path / name).touch()
    contexts.kmeans([X], 2).save(tmp_path)
    contexts.kmeans([X + 50], 2).save(tmp_path)
    assert len({path.name for path in tmp_path.iterdir()} - theirs) == 2
    assert theirs <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_kill_while_saving_leaves_the_old_one(tmp_path, monkeypatch, kept, share):
    """The process dies within the write of the first or second file, or before its renaming."""
    first = contexts.kmeans([X], 2)
    first.save(tmp_path)
    done = []

    def die(path, data):
        if len(done) == kept:
            (tmp_path / f"{path.name}.0.tmp").write_bytes(data[: int(share * len(data))])
            raise KeyboardInterrupt
        done.append(path)
        replace(path, data)

    replace = whole_file.write_whole
    monkeypatch.setattr(whole_file, "write_whole", die)
    with pytest.raises(KeyboardInterrupt):
        contexts.kmeans([X + 50], 2).save(tmp_path)
    assert torch.equal(contexts.load(tmp_path)(X), first(X))


def test_features_of_a_model_need_the_same_model_again(tmp_path):
    model = nn.Linear(4, 3)
    assigner = contexts.kmeans([X], 2, features=model)
    assigner.save(tmp_path)
    with pytest.raises(ContextError, match=r"features of Linear of weights .*features=model"):
        contexts.load(tmp_path)
    with pytest.raises(ContextError, match="expected features= Linear of weights"):
        contexts.load(tmp_path, features=nn.Linear(4, 3))
    again = nn.Linear(4, 3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(contexts.load(tmp_path, features=again)(X), assigner(X))


def test_features_that_were_not_used_are_refused(tmp_path):
    contexts.kmeans([X], 2).save(tmp_path)
    with pytest.raises(ContextError, match="expected features= pixels"):
        contexts.load(tmp_path, features=embed)


def edit(folder, **changes):
    """Change a record as one who knows the digest could."""
    path = folder / store.NAME
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**content, "digest": whole_file.digest_of(content)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "no assigner that normswap.contexts saved"),
        ({"version": 3}, "expected version 2 .* got 3"),
        ({"kind": "dbscan"}, "of a kind among .* got 'dbscan'"),
        ({"kind": "columns"}, "damaged"),
        ({"kind": ["kmeans"]}, "of a kind among"),
        ({"names": ["a", "b", "c"]}, "damaged"),
        ({"names": ["a", "a"]}, "damaged"),
        ({"names": "ab"}, "damaged"),
        ({"counts": {"sizes": [1]}}, "damaged"),
        ({"counts": {"sizes": [1, -1]}}, "damaged"),
        ({"counts": 3}, "damaged"),
        ({"counts": {"sizes": [math.inf, 1]}}, "damaged"),
        ({"counts": {"sizes": [10**400, 1, 1]}}, "damaged"),
        ({"version": True}, "expected version 2 .* got True"),
        ({"bytes": 3}, "more than the 3 expected"),
        ({"features": None}, "damaged"),
        ({"arrays": "../../etc/passwd"}, "a file beside it"),
        ({"arrays": "gone.safetensors"}, "are missing"),
        ({"arrays": None}, "damaged"),
        ({"sha256": "0"}, "is damaged"),
    ],
)
def test_a_changed_record_is_refused(tmp_path, changes, message):
    contexts.kmeans([X], 2).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ContextError, match=message):
        contexts.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x80"])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / store.NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ContextError, match=r"damaged|is no assigner"):
        contexts.load(tmp_path)


def test_a_damaged_array_is_refused(tmp_path):
    contexts.kmeans([X], 2).save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ContextError, match="is damaged"):
        contexts.load(tmp_path)


def test_a_table_of_contexts_out_of_range_is_refused(tmp_path):
    make("indices", tmp_path).save(tmp_path)
    edit(tmp_path, table=[[3, 0], [5, 7]])
    with pytest.raises(ContextError, match="damaged"):
        contexts.load(tmp_path)


def test_changed_at_any_bit_nothing_is_loaded(tmp_path):
    assigner = make("indices", tmp_path)
    assigner.save(tmp_path)
    path = tmp_path / store.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
            )
            try:
                twin = contexts.load(tmp_path)
            except ContextError:
                continue
            # White space between entries, alone, says nothing.
            assert json.loads(path.read_bytes()) == json.loads(whole)
            assert twin.names == assigner.names


def test_a_file_of_the_version_before_which_has_no_digest_is_loaded(tmp_path):
    assigner = contexts.kmeans([X], 2)
    assigner.save(tmp_path)
    path = tmp_path / store.NAME
    content = {**json.loads(path.read_text()), "version": 1}
    del content["digest"], content["bytes"]
    path.write_text(json.dumps(content))
    assert torch.equal(contexts.load(tmp_path)(X), assigner(X))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("which", [store.NAME, "arrays"])
def test_a_named_pipe_is_not_waited_for(tmp_path, which):
    contexts.kmeans([X], 2).save(tmp_path)
    path = next(tmp_path.glob("*.safetensors")) if which == "arrays" else tmp_path / which
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ContextError, match="no regular file"):
        contexts.load(tmp_path)


@pytest.mark.parametrize("which", [store.NAME, "arrays"])
def test_a_huge_file_is_not_read(tmp_path, which):
    contexts.kmeans([X], 2).save(tmp_path)
    path = next(tmp_path.glob("*.safetensors")) if which == "arrays" else tmp_path / which
    os.truncate(path, 1 << 40)
    with pytest.raises(ContextError, match=r"more than the .* expected"):
        contexts.load(tmp_path)


def test_arrays_that_are_none_are_refused(tmp_path):
    contexts.kmeans([X], 2).save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(b"no tensors")
    edit(tmp_path, sha256=whole_file.digest(b"no tensors"))
    with pytest.raises(ContextError, match="does not read as safetensors"):
        contexts.load(tmp_path)


def test_a_record_nested_without_end_is_refused(tmp_path):
    (tmp_path / store.NAME).write_text("[" * 100_000)
    with pytest.raises(ContextError, match="is damaged"):
        contexts.load(tmp_path)


@pytest.mark.parametrize("folder", [None, 3, ["a"], b"a"], ids=str)
def test_what_is_no_path_is_refused(folder):
    with pytest.raises(ContextError, match="expected a folder as a path, got"):
        contexts.load(folder)
    with pytest.raises(ContextError, match="expected a folder as a path, got"):
        contexts.kmeans([X], 2).save(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ContextError, match="expected a saved assigner in"):
        contexts.load(tmp_path)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ContextError, match="cannot write an assigner"):
        contexts.kmeans([X], 2).save(tmp_path / "file" / "folder")


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(normswap.NormswapError, match=r"pip install 'normswap\[contexts\]'"):
        contexts.kmeans([X], 2)
