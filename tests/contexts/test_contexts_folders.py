"""Contexts that are looked up by folder."""

import pytest
import torch

from normswap import ContextError, ContextWarning, contexts


def make_images(root, layout, count=3):
    for folder in layout:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.png").touch()
    return root


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
