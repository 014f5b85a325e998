import random

import pytest
import torch

from recipes import sentiment
from recipes.__main__ import main
from recipes.common.errors import RecipeError
from recipes.common.grid import read_lines


@pytest.fixture
def sentences(tmp_path):
    """Films and products: one good or bad word among others that say nothing."""
    draw = random.Random(0)
    folder = tmp_path / "sentences"
    folder.mkdir()
    for part, name in sentiment.FILES.items():
        own = ["film", "plot", "scene"] if part != "target" else ["phone", "price", "screen"]
        lines = []
        for i in range(300 if part == "train" else 60):
            words = [draw.choice(own) for _ in range(4)]
            words.insert(draw.randrange(5), ("bad", "good")[i % 2])
            lines.append(f"{i % 2} {' '.join(words)}")
        (folder / name).write_text("\n".join(lines))
    return folder


def test_the_recipe_learns_and_reports(sentences, tmp_path, capsys):
    given = ["--data", str(sentences), "--epochs", "2", "--seeds", "1", "--lr", "3e-3"]
    assert main(["sentiment", *given, "--out", str(tmp_path)]) == 0

    folder = tmp_path / "sentiment"
    results = read_lines(folder / "results.jsonl")
    assert [r["cell"]["method"] for r in results] == list(sentiment.METHODS)
    assert all(r["target"] > 90 for r in results), results
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "epochs.jsonl", "results.jsonl", "results.png", "report.txt", "table.json",
    }  # fmt: skip
    assert "products" in capsys.readouterr().out


def test_every_method_starts_from_the_same_weights_and_function():
    words = torch.randint(0, 40, (6, 12))
    plain = sentiment.build("bn", 40, seed=1).eval()
    for method in ("cn", "cn-x", "acn", "crossnorm", "selfnorm", "cnsn"):
        torch.testing.assert_close(sentiment.build(method, 40, seed=1).eval()(words), plain(words))


def test_a_training_is_the_same_again(sentences, tmp_path):
    given = ["--data", str(sentences), "--smoke", "--methods", "cnsn", "--out", str(tmp_path)]
    for name in ("one", "two"):
        assert main(["sentiment", *given, "--name", name]) == 0

    lines = [(tmp_path / name / "epochs.jsonl").read_text() for name in ("one", "two")]
    assert lines[0] == lines[1]
    # What a run to be resumed was given, it need not be given again.
    more = ["--methods", "cnsn", "bn", "--out", str(tmp_path), "--name", "one", "--resume"]
    assert main(["sentiment", *more]) == 0
    assert len(read_lines(tmp_path / "one" / "results.jsonl")) == 2


def test_words_are_numbered_from_two_and_rare_ones_are_unknown():
    lines = [(1, ["a", "b", "a"]), (0, ["b", "c"])]
    words = sentiment.vocabulary(lines, least=2)
    rows = sentiment.encode(lines, words, longest=2).words

    assert words == {"a": 2, "b": 3}
    assert rows.tolist() == [[2, 3], [3, sentiment.UNKNOWN]]


def test_a_line_of_another_form_is_an_error(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("1 good\nbad one\n")
    with pytest.raises(RecipeError, match=r"line 2 of .*got 'bad one'"):
        sentiment.read(path)
