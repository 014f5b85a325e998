"""``normswap plot``, in this process: what it reads, writes and refuses."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import normswap
from normswap import plot
from normswap.cli.main import main
from normswap.plot import run_files
from normswap.plot.divergence import model_divergences
from tests.support.models import make_inputs, make_model

RECORDS = [
    {
        "epoch": epoch,
        "seconds": 1.0,
        "arms": {
            "bn": {"loss": 2.0 / epoch, "accuracy": {"unknown": {"a": 40, "b": 60, "c": 0}}},
            "cn": {
                "loss": 3.0 / epoch,
                "accuracy": {"unknown": {"a": 10, "b": 30, "c": 0}, "known": {"a": 80, "b": 90}},
            },
        },
    }
    for epoch in (1, 2)
]


def convert(method="cn", **keywords):
    model = make_model()
    given = {} if method == "acn" else {"contexts": ["a", "b"]}
    model = normswap.convert(model, method, example_inputs=make_inputs(model), **given, **keywords)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "mu")):
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    return model


def save(model, path):
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    settings = {"model": "no_such_model", "held_out": "c"}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    save(convert(), folder / "model.safetensors")
    return folder


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["curves"],
        ["divergence"],
        ["divergence", "--names", "x,y"],
        ["densities", "--layer", "neck"],
    ],
)
def test_a_run_is_drawn(run, tmp_path, capsys, arguments):
    out = tmp_path / "picture.png"
    assert main(["plot", arguments[0], str(run), *arguments[1:], "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert is_picture(out)


def test_the_order_of_layers_needs_no_timm(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    out = tmp_path / "picture.png"
    assert main(["plot", "divergence", str(run), "--out", str(out)]) == 0
    assert is_picture(out)


def test_where_crossnorm_would_fire_is_drawn_of_a_timm_model(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "firing", "resnet10t", "--forwards", "20"]) == 0
    assert is_picture(tmp_path / "firing.png")


def test_curves_of_a_run_leave_the_held_out_domain_out(run):
    given = run_files.read_curves(run)
    assert given["x"] == [1, 2]
    loss, accuracy = given["panels"].values()
    assert loss == {"bn": [2.0, 1.0], "cn": [3.0, 1.5]}
    assert accuracy == {
        "bn": [50, 50],
        "cn, label known": [85, 85],
        "cn, label unknown": [20, 20],
    }


def test_other_records_have_a_panel_for_each_number(tmp_path):
    lines = [{"step": 10, "loss": 1.0, "note": "x"}, {"step": 20, "loss": 0.5, "top1": 3}]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    given = run_files.read_curves(path)
    assert (given["x"], given["xlabel"]) == ([10, 20], "step")
    assert given["panels"] == {"loss": {"loss": [1.0, 0.5]}, "top1": {"top1": [None, 3]}}


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_divergences_of_a_file_are_those_of_the_model(method, tmp_path):
    model = convert(method)
    save(model, tmp_path / "some.safetensors")
    order = [name for name, _ in model.named_modules()]
    rows = run_files.divergences_in(run_files.read_tensors(tmp_path), order)
    report = normswap.summary(model)
    assert list(rows) == [row.fqn for row in report.rows]
    shown = plot.divergence(model).axes[0].get_images()[0].get_array()
    assert torch.allclose(torch.stack(list(rows.values())), torch.as_tensor(shown.data), rtol=1e-5)


def test_layers_of_unknown_order_are_sorted_with_numbers_by_size(tmp_path):
    norm = {"running_mean": torch.zeros(2, 3), "running_var": torch.ones(2, 3)}
    tensors = {f"layer{k}.{n}": v for k in (10, 9, 1) for n, v in norm.items()}
    tensors |= {f"layer{k}.priors": torch.full((2,), 0.5) for k in (10, 9, 1)}
    assert list(run_files.divergences_in(tensors)) == ["layer1", "layer9", "layer10"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curves", "{}/none"], "expected a run with metrics.jsonl"),
        (["curves", "{}/bad.jsonl"], "is not one JSON record a line"),
        (["curves", "{}/empty.jsonl"], "expected records, one a line"),
        (["curves", "{}/list.jsonl"], "expected records, one a line"),
        (["curves", "{}/arms.jsonl"], "holds other records than a run writes"),
        (["curves", "{}/text.jsonl"], "expected curves of one length"),
        (["divergence", "{}"], "expected model.safetensors, or one safetensors file"),
        (["divergence", "{}/none"], "cannot read tensors"),
        (["divergence", "{}/bad.jsonl"], "cannot read tensors"),
        (["divergence", "{}/plain.safetensors"], "found no layer of CN, CN-X or ACN"),
        (["densities", "{}/plain.safetensors", "--layer", "x"], "got 'x'; they are: none"),
        (["firing", "resnet10t", "--method", "cn"], "method='crossnorm' or 'cnsn'"),
        (["firing", "resnet10t", "--forwards", "0"], "forwards= of at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "arms.jsonl").write_text('{"arms": {"bn": 3}}\n')
    (tmp_path / "text.jsonl").write_text('{"a": "b"}\n')
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "plain.safetensors")
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "second.safetensors")
    out = ["--out", str(tmp_path / "out.png")]
    given = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    assert main(["plot", *given, *out]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.filterwarnings("ignore:samples without a label are now answered")
@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_a_saved_conversion_is_drawn_as_the_model_is(method, tmp_path, monkeypatch):
    model = convert(method)
    if method != "acn":
        normswap.add_context(model, "night", like="b", share=0.7)
    normswap.save(model, tmp_path)
    normswap.save(model, tmp_path)
    (tmp_path / "tensors-0123456789abcdef.safetensors").write_bytes(b"left by a killed save")
    drawn = []
    monkeypatch.setattr(plot, "divergence", lambda rows, **given: drawn.append((rows, given)))
    assert main(["plot", "divergence", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0
    ((rows, given),) = drawn
    expected, names, title = model_divergences(model)
    assert list(rows) == list(expected)
    assert given["names"] == names
    assert given["title"] == title
    for name, row in rows.items():
        torch.testing.assert_close(row, expected[name], rtol=1e-5, atol=1e-7, check_dtype=False)


def test_pictures_of_a_saved_conversion_are_written(tmp_path):
    normswap.save(convert(), tmp_path)
    out = tmp_path / "picture.png"
    for arguments in (["divergence"], ["densities", "--layer", "neck"]):
        assert main(["plot", arguments[0], str(tmp_path), *arguments[1:], "--out", str(out)]) == 0
        assert is_picture(out)
        out.unlink()


def test_a_damaged_saved_conversion_is_one_line_and_exit_2(tmp_path, capsys):
    normswap.save(convert(), tmp_path)
    (tmp_path / "normswap.json").write_text("{")
    assert main(["plot", "divergence", str(tmp_path)]) == 2
    assert "cannot read" in capsys.readouterr().err
