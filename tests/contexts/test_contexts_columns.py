"""Contexts that are looked up in columns of metadata."""

import csv
import warnings

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from normswap import ContextError, ContextWarning, UnknownNameError, contexts

ROWS = [
    {"camera": "B", "site": 10, "age": 31, "label": "x"},
    {"camera": "A", "site": 9.0, "age": 64.5, "label": "y"},
    {"camera": "A", "site": "9", "age": None, "label": "x"},
    {"camera": "", "site": 10, "age": 5, "label": "y"},
]


@pytest.mark.usefixtures("quiet")
class TestColumns:
    def test_each_value_is_a_context_and_a_missing_one_unknown(self):
        assigner = contexts.from_columns(ROWS, "camera")
        assert assigner.names == ("A", "B")
        assert assigner.labels.tolist() == [1, 0, 0, -1]
        assert assigner.report().unknown == 1

    def test_what_pandas_has_for_missing_values_is_missing(self):
        class NAType:
            def __str__(self):
                return "<NA>"

        rows = [{"camera": "A"}, {"camera": NAType()}]
        assigner = contexts.from_columns(rows, "camera")
        assert assigner.names == ("A",)
        assert assigner.labels.tolist() == [0, -1]

    def test_several_columns_decide_together_numbers_in_order(self):
        assigner = contexts.from_columns(ROWS, ["site", "camera"])
        assert assigner.names == ("9 / A", "10 / B")
        assert assigner.labels.tolist() == [1, 0, 0, -1]

    def test_an_edge_belongs_to_the_bin_above_and_outer_bins_are_open(self):
        assigner = contexts.from_columns(ROWS, "age", bins={"age": [31, 60]})
        assert assigner.names == ("age < 31", "31 <= age < 60", "age >= 60")
        ages = [{"age": value} for value in (-1e9, 30.9, 31, "60", 1e9, float("nan"), None)]
        assert assigner(ages).tolist() == [0, 0, 1, 2, 2, -1, -1]

    def test_bins_of_a_count_are_about_equal(self):
        rows = [{"v": (7 * k) % 100} for k in range(100)]
        assert contexts.from_columns(rows, "v", bins={"v": 4}).sizes == (25, 25, 25, 25)

    def test_a_csv_file_dicts_and_columns_are_the_same_rows(self, tmp_path):
        path = tmp_path / "rows.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
        columns = {"camera": ["B", "A", "A", ""], "site": torch.tensor([10, 9, 9, 10])}
        assigner = contexts.from_columns(path, ["camera", "site"])
        for rows in (path, ROWS, columns):
            assert assigner(rows).tolist() == [1, 0, 0, -1]

    def test_combinations_not_met_before_are_unknown(self):
        assigner = contexts.from_columns(ROWS, ["camera", "site"])
        assert assigner([{"camera": "A", "site": 10}, {"camera": "B"}]).tolist() == [-1, -1]

    @pytest.mark.parametrize(
        ("rows", "arguments", "message"),
        [
            ([], {"columns": "camera"}, "expected rows of metadata, got none"),
            (ROWS, {"columns": []}, "expected columns="),
            ([{"camera": ""}], {"columns": "camera"}, "no row has a value"),
            ([1, 2], {"columns": "camera"}, "expected rows as dicts"),
            (None, {"columns": "camera"}, "expected rows as dicts"),
            (ROWS, {"columns": "age", "bins": ["age"]}, "expected bins= as column"),
            (ROWS, {"columns": "age", "bins": {"age": "x"}}, "expected numbers as edges"),
            ({"a": [1], "b": [1, 2]}, {"columns": "a"}, "columns of one length"),
            (ROWS, {"columns": "camera", "bins": {"camera": 2}}, "expected numbers in the binned"),
            (ROWS, {"columns": "camera", "bins": {"age": 2}}, "bins= of columns that decide"),
            (ROWS, {"columns": "age", "bins": {"age": [3, 3]}}, "expected rising finite edges"),
            (ROWS, {"columns": "age", "bins": {"age": 1}}, "expected two bins or more"),
            (ROWS, {"columns": "site", "bins": {"site": 4}}, "enough different numbers"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, rows, arguments, message):
        with pytest.raises(ContextError, match=message):
            contexts.from_columns(rows, **arguments)

    def test_an_unknown_column_is_named_with_the_columns(self):
        with pytest.raises(UnknownNameError, match=r"no column 'lens'; the columns are 'camera'"):
            contexts.from_columns(ROWS, "lens")

    def test_a_ragged_csv_file_is_refused(self, tmp_path):
        (tmp_path / "rows.csv").write_text("a,b\n1,2\n1,2,3\n")
        with pytest.raises(ContextError, match=r"row 3 .* more cells than the heading"):
            contexts.from_columns(tmp_path / "rows.csv", "a")

    def test_a_missing_csv_file_is_named(self, tmp_path):
        with pytest.raises(ContextError, match="cannot read the CSV file"):
            contexts.from_columns(tmp_path / "none.csv", "a")


def test_the_leak_is_the_normalised_mutual_information():
    generator = torch.Generator().manual_seed(0)
    camera = torch.randint(3, (600,), generator=generator)
    label = (camera + torch.randint(2, (600,), generator=generator)) % 4
    rows = {"camera": camera, "label": label}
    with pytest.warns(ContextWarning, match="gives the target away"):
        report = contexts.from_columns(rows, "camera", target="label").report()
    expected = normalized_mutual_info_score(camera, label, average_method="min")
    assert report.leak == pytest.approx(expected, abs=1e-9)


def test_chance_alone_is_no_leak():
    """Twenty contexts of forty samples and thirty classes share information by chance."""
    generator = torch.Generator().manual_seed(1)
    rows = {
        "camera": torch.arange(20).repeat(40),
        "label": torch.randint(30, (800,), generator=generator),
    }
    report = contexts.from_columns(rows, "camera", target="label").report()
    assert report.leak > 0.1
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("sizes", "tiny"),
    [([32, 32], []), ([31, 400], ["0 (31)"]), ([400, 4000, 8200], ["0 (400)"])],
)
def test_tiny_is_under_32_samples_or_a_tenth_of_an_even_share(sizes, tiny):
    rows = [{"v": k} for k, size in enumerate(sizes) for _ in range(size)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contexts.from_columns(rows, "v")
    assert len(caught) == bool(tiny)
    assert all(name in str(caught[0].message) for name in tiny)
