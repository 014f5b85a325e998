"""Tables, pictures and the kept runs they are made from."""

import json

import pytest
from matplotlib.figure import Figure

from recipes import results
from recipes.__main__ import main
from recipes.common import reports, runs
from recipes.common.reports import draw_points


def record(method, seed, **figures):
    return {"cell": {"method": method, "seed": seed}, **figures}


RECORDS = [
    record("bn", 0, accuracy=80.0), record("bn", 1, accuracy=82.0),
    record("acn", 0, accuracy=81.0), record("acn", 1, accuracy=85.0),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs" / "toy"
    runs.write_config(folder, {"recipe": "toy"})
    return folder


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_the_table_is_of_mean_and_sample_deviation():
    rows = rows_of(reports.table(RECORDS, {"accuracy": "right, %", "none": "missing"}))
    assert rows[0] == ["method", "runs", "right, %", "missing"]
    assert rows[2] == ["bn", "2", "81.0 +- 1.4", "-"]  # of 80 and 82: sqrt(2)


def test_differences_are_paired_and_have_a_standard_error():
    rows = rows_of(reports.table(RECORDS, {"accuracy": "right, %"}, "accuracy", 2))
    assert rows[2][-1] == ""
    # Differences of 1 and 3: a standard deviation of sqrt(2), over sqrt(2).
    assert rows[3] == ["acn", "2", "83.00 +- 2.83", "+2.00 +- 1.00"]


def test_several_figures_may_be_compared():
    records = [{**r, "more": 2 * r["accuracy"]} for r in RECORDS]
    headings = {"accuracy": "right, %", "more": "double"}
    rows = rows_of(reports.table(records, headings, ["accuracy", "more"], 2))
    assert rows[0][-2:] == ["right, %, above bn", "double, above bn"]
    assert rows[3][-2:] == ["+2.00 +- 1.00", "+4.00 +- 2.00"]


def test_a_difference_is_of_trainings_that_share_all_but_the_method():
    held = [{**r, "cell": {**r["cell"], "held_out": str(i)}} for i, r in enumerate(RECORDS)]
    assert reports.differences(held, "accuracy") == {}
    assert reports.differences(RECORDS[:1] + RECORDS[2:], "accuracy") == {"acn": [1.0]}


def test_the_report_names_command_and_versions(folder):
    reports.finish(folder, "a table")
    report = (folder / "report.txt").read_text()
    assert report.startswith("python -m recipes")
    assert "torch" in report
    assert report.endswith("a table\n")


def test_a_picture_shows_every_run(tmp_path, monkeypatch):
    shown = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        dots = [line for line in figure.axes[0].lines if line.get_marker() == "."]
        shown.extend(y for line in dots for y in line.get_ydata())
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    path = tmp_path / "points.png"
    draw_points(path, RECORDS, {"accuracy": "right", "none": "missing"}, "toy")

    assert sorted(shown) == [80, 81, 82, 85]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_a_kept_run_gives_the_table_and_the_picture_again(folder, tmp_path):
    reports.show(folder, RECORDS, {"accuracy": "right, %"}, "toy", None, "accuracy")
    page, kept = tmp_path / "page.md", tmp_path / "kept"
    page.write_text("before\n<!-- table toy -->\nold\n<!-- end -->\nafter\n")
    given = ["--page", str(page), "--kept", str(kept)]

    assert main(["results", "--keep", str(folder), "--draw", str(tmp_path / "drawn"), *given]) == 0
    text = page.read_text()
    table = reports.table(RECORDS, {"accuracy": "right, %"}, "accuracy")
    assert table in text
    assert table in (folder / "report.txt").read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- table toy -->\n`python -m recipes")
    assert text.endswith("<!-- end -->\nafter\n")
    assert (tmp_path / "drawn" / "toy.png").exists()
    assert main(["results", *given]) == 0
    assert page.read_text() == text


def test_a_kept_run_says_how_long_it_took_and_on_what(folder, tmp_path):
    timed = [{**record, "seconds": 4.5} for record in RECORDS]
    reports.show(folder, timed, {"accuracy": "right, %"}, "toy")
    results.keep(folder, tmp_path, "toy")
    found = json.loads((tmp_path / "toy.json").read_text())
    assert [record["seconds"] for record in found["records"]] == [4.5] * 4
    cpu = found["versions"]["cpu"]
    assert cpu
    _, text = results.read(tmp_path / "toy.json")
    assert "4.5" not in text
    assert cpu not in text


def test_a_table_without_its_run_and_a_run_without_a_table_are_errors(folder, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table other -->\n<!-- end -->\n")
    given = ["--page", str(page), "--kept", str(tmp_path / "kept")]
    assert main(["results", *given]) == 2
    assert "got none for other" in capsys.readouterr().err
    assert main(["results", "--keep", str(folder), *given]) == 2
    assert "expected a finished run with table.json" in capsys.readouterr().err
    assert page.read_text() == "<!-- table other -->\n<!-- end -->\n"
    page.unlink()
    assert main(["results", *given]) == 2
    assert "expected a page with tables" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "3", '{"records": []}', '{"versions": {}}'])
def test_a_damaged_file_is_named_with_the_way_out(damage, folder, tmp_path, capsys):
    reports.show(folder, RECORDS, {"accuracy": "right, %"}, "toy", None, "accuracy")
    page, kept = tmp_path / "page.md", tmp_path / "kept"
    page.write_text("<!-- table toy -->\n<!-- end -->\n")
    given = ["results", "--page", str(page), "--kept", str(kept)]
    assert main([*given, "--keep", str(folder)]) == 0
    before = page.read_text()
    for path, text in ((kept / "toy.json", "keep its run again"), (folder / "table.json", "again")):
        whole = path.read_text()
        path.write_text(damage)
        assert main([*given, *(["--keep", str(folder)] if path.parent == folder else [])]) == 2
        error = capsys.readouterr().err
        assert f"cannot read {path}" in error
        assert text in error
        assert page.read_text() == before
        path.write_text(whole)


@pytest.mark.parametrize(
    "given",
    [
        "--data /a/b.zip --out /c --name d --jobs 2 --seeds 3 --resume",
        "--out='/my runs' --data=/a/b.zip --jobs=2 --seeds=3 --name 'd e'",
    ],
)
def test_a_kept_command_names_no_place(given):
    found = results.without_places(f"python -m recipes x {given}")
    assert found == "python -m recipes x --data b.zip --seeds 3"


def test_the_page_has_the_tables_of_the_runs_that_are_kept():
    kept = {path.stem: results.read(path) for path in results.KEPT.glob("*.json")}
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.filled(page, kept) == page
    assert {name for _, name, _ in results.PLACE.findall(page)} == set(kept)
