import torch

from recipes.__main__ import main
from recipes.common.digits import load_digits
from recipes.common.grid import read_lines
from recipes.common.images import pick
from recipes.common.scores import HEADINGS

SMALL = ["fixmatch", "--smoke", "--model", "test_resnet"]


def results(folder):
    return read_lines(folder / "results.jsonl")


def test_the_smoke_run_trains_and_tests_every_method_and_repeats_itself(tmp_path, capsys):
    methods = ["labels-only", "bn", "cnsn", "acn", "cn"]
    assert main([*SMALL, "--methods", *methods, "--out", str(tmp_path)]) == 0

    folder = tmp_path / "fixmatch-smoke"
    found = {record["cell"]["method"]: record for record in results(folder)}
    assert list(found) == methods
    for method, record in found.items():
        expected = {"known", "pooled", "posterior"} if method == "cn" else {"plain"}
        assert expected == set(record) & set(HEADINGS)
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "epochs.jsonl", "results.jsonl", "results.png", "report.txt",
        "table.json",
    }  # fmt: skip
    assert "unlabelled" in capsys.readouterr().out

    assert main([*SMALL, "--methods", "cn", "--out", str(tmp_path), "--name", "again"]) == 0
    lines, again = (
        (tmp_path / name / "epochs.jsonl").read_text().splitlines() for name in (folder, "again")
    )
    assert [line for line in lines if '"cn"' in line] == again


def test_a_folder_of_classes_and_one_of_domains_run(folder, tmp_path, capsys):
    given = ["--model", "test_resnet", "--image-size", "32", "--smoke", "--labels", "2"]
    given += ["--methods", "cn", "--out", str(tmp_path)]
    for data, domains in ((folder, ["day", "night"]), (folder / "night", ["night"])):
        assert main(["fixmatch", "--data", str(data), "--name", f"of-{data.name}", *given]) == 0
        assert "known" in results(tmp_path / f"of-{data.name}")[0]
        lines = [line for line in capsys.readouterr().out.splitlines() if "training and" in line]
        assert lines == [f"{name}: 8 training and 2 test images of 32 px" for name in domains]


def test_as_many_labels_of_each_class_are_picked_from_the_training_images():
    data = load_digits(limit=200, angles=(0,))
    picked = pick(data, 3, 5, "--labels")

    assert data.labels[picked].bincount().tolist() == [3] * 10
    assert data.train[picked].all()
    assert len(picked.unique()) == 30
    assert torch.equal(picked, pick(data, 3, 5, "--labels"))
    assert not torch.equal(picked, pick(data, 3, 6, "--labels"))
