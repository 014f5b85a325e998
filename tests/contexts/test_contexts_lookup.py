"""Contexts that are looked up: by folder, superclass, metadata."""

import csv
import hashlib
import warnings

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from normswap import ContextError, ContextWarning, UnknownNameError, contexts


@pytest.fixture
def quiet():
    """Sets this small are tiny, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)
        yield


def make_images(root, layout, count=3):
    for folder in layout:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.png").touch()
    return root


def superclasses(*arguments, **keywords):
    with pytest.warns(ContextWarning, match="leave the label unknown"):
        return contexts.from_superclasses(*arguments, **keywords)


@pytest.mark.usefixtures("quiet")
class TestFolders:
    def test_each_top_folder_is_a_context_whatever_lies_below(self, tmp_path):
        make_images(tmp_path, ["photo/dog", "photo/cat/more", "sketch"])
        (tmp_path / "photo" / "notes.txt").touch()
        assigner = contexts.from_folders(tmp_path)
        assert assigner.names == ("photo", "sketch")
        assert assigner.sizes == (6, 3)
        assert torch.equal(assigner(assigner.paths), assigner.labels)
        assert assigner.labels.tolist() == [0] * 6 + [1] * 3

    def test_priors_are_the_shares(self, tmp_path):
        assigner = contexts.from_folders(make_images(tmp_path, ["a/x", "a/y", "b/x"]))
        assert assigner.priors.tolist() == pytest.approx([2 / 3, 1 / 3])

    def test_paths_elsewhere_go_by_the_one_known_folder_among_theirs(self, tmp_path):
        assigner = contexts.from_folders(make_images(tmp_path, ["photo/dog", "sketch/dog"]))
        paths = ["/else/sketch/dog/9.png", "/else/dog/9.png", "/else/photo/sketch/9.png", "9.png"]
        assert assigner(paths).tolist() == [1, -1, -1, -1]

    def test_a_folder_made_later_below_the_root_is_unknown(self, tmp_path):
        assigner = contexts.from_folders(make_images(tmp_path, ["photo", "sketch"]))
        assert assigner([tmp_path / "new" / "photo" / "1.png"]).tolist() == [-1]

    def test_names_compare_whatever_form_the_file_system_gives_accents(self, tmp_path):
        assigner = contexts.from_folders(make_images(tmp_path, ["caf\u00e9", "写真"]))
        assert assigner(["/x/cafe\u0301/1.png", "/x/写真/1.png"]).tolist() == [0, 1]

    def test_hidden_folders_and_files_are_left_out(self, tmp_path):
        make_images(tmp_path, ["photo", ".cache", "photo/.thumbs"])
        (tmp_path / "photo" / ".1.png").touch()
        assert contexts.from_folders(tmp_path).sizes == (3,)

    def test_a_link_to_a_folder_above_ends(self, tmp_path):
        make_images(tmp_path, ["photo/dog"])
        (tmp_path / "photo" / "dog" / "loop").symlink_to(tmp_path / "photo")
        assert contexts.from_folders(tmp_path).sizes == (3,)

    def test_images_beside_the_domains_are_refused(self, tmp_path):
        make_images(tmp_path, ["photo"])
        (tmp_path / "stray.JPG").touch()
        with pytest.raises(ContextError, match=r"1 directly there \(stray\.JPG"):
            contexts.from_folders(tmp_path)

    @pytest.mark.parametrize("made", [True, False])
    def test_no_images_is_an_error(self, tmp_path, made):
        if made:
            (tmp_path / "gone" / "empty").mkdir(parents=True)
        with pytest.raises(ContextError, match="found none"):
            contexts.from_folders(tmp_path / "gone")

    def test_a_tensor_is_no_path(self, tmp_path):
        assigner = contexts.from_folders(make_images(tmp_path, ["photo"]))
        with pytest.raises(ContextError, match="expected paths"):
            assigner(torch.zeros(2))


def test_folders_that_hold_a_class_each_give_the_target_away(tmp_path):
    make_images(tmp_path, ["zoo/tiger", "farm/cow"], count=40)
    with pytest.warns(ContextWarning, match="gives the target away"):
        report = contexts.from_folders(tmp_path).report()
    assert report.leak == pytest.approx(1)


def test_folders_with_every_class_give_nothing_away(tmp_path):
    make_images(tmp_path, ["a/x", "a/y", "b/x", "b/y"], count=40)
    assert contexts.from_folders(tmp_path).report().leak == pytest.approx(0)


def test_cifar100_is_the_published_table():
    assigner = superclasses("cifar100")
    fine = assigner(torch.arange(100))
    assert torch.bincount(fine).tolist() == [5] * 20
    # The coarse labels of the fine classes in order, as the data set's own files pair them.
    digest = hashlib.sha256(" ".join(map(str, fine.tolist())).encode()).hexdigest()
    assert digest.startswith("448687706f47d6d0eaafa691")


@pytest.mark.parametrize(
    ("name", "superclass"),
    [
        ("apple", "fruit_and_vegetables"),
        ("crab", "non-insect_invertebrates"),
        ("kangaroo", "large_omnivores_and_herbivores"),
        ("pickup_truck", "vehicles_1"),
        ("streetcar", "vehicles_2"),
        ("possum", "medium_mammals"),
    ],
)
def test_cifar100_knows_names(name, superclass):
    assigner = superclasses("cifar100")
    assert assigner.names[int(assigner(name))] == superclass


def test_a_superclass_always_says_that_the_label_is_unknown_at_test_time():
    targets = torch.arange(100).repeat(40)
    assigner = superclasses("cifar100", targets=targets)
    assert "leave the label unknown at test time" in str(assigner.report())
    assert assigner.report().leak == pytest.approx(1)


def test_superclasses_count_targets():
    assigner = superclasses({"cat": "pet", "tiger": "wild"}, ["cat", "tiger"], [0] * 90 + [1] * 40)
    assert assigner.sizes == (90, 40)
    assert assigner.priors.tolist() == pytest.approx([9 / 13, 4 / 13])


def test_unknown_classes_are_minus_one():
    assigner = superclasses({"cat": "pet", "tiger": "wild"}, classes=["tiger", "cat"])
    assert assigner(torch.tensor([0, 1, 2, -1])).tolist() == [1, 0, -1, -1]
    assert assigner(["cat", "zebra", None]).tolist() == [0, -1, -1]


def test_indices_need_the_order_of_the_classes():
    with pytest.raises(ContextError, match=r"from_superclasses\(\.\.\., classes="):
        superclasses({"cat": "pet", "tiger": "wild"})(torch.tensor([0]))


def test_a_mapping_from_indices_takes_indices():
    assert superclasses({7: "a", 9: "b"})(torch.tensor([9, 7, 8])).tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "expected a mapping"),
        (({1: "a", "b": "c"},), "expected a mapping"),
        (({"a": 1},), "expected a mapping"),
        ((None,), "expected a dict"),
        (({"a": "b"}, ["a", "z"]), "found none for z"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ContextError, match=message):
        contexts.from_superclasses(*arguments)


def test_an_unknown_table_is_refused():
    with pytest.raises(UnknownNameError, match="there is 'cifar100'"):
        contexts.from_superclasses("imagenet")


def test_float_classes_are_refused():
    with pytest.raises(ContextError, match=r"integers \(N,\), got torch.float32"):
        superclasses("cifar100")(torch.zeros(3))


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


def test_a_report_of_other_samples_needs_their_labels():
    assigner = superclasses({"cat": "pet", "tiger": "wild"}, ["cat", "tiger"])
    with pytest.raises(ContextError, match="call report"):
        assigner.report(targets=[0, 1])
    labels = assigner(torch.tensor([0, 1, 1]))
    assert assigner.report([0, 1, 1], labels).sizes == (1, 2)
    with pytest.raises(ContextError, match=r"labels in \[-1, 2\)"):
        assigner.report(labels=labels + 1)
    with pytest.raises(ContextError, match="as many targets as labels, 3, got 2"):
        assigner.report([0, 1], labels)
