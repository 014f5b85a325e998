import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.common import decoding
from recipes.common.errors import RecipeError
from recipes.common.folders import load_folder


def test_domains_and_classes_come_from_the_folders(folder):
    data = load_folder(folder, 16)
    assert data.domain_names == ["day", "night"]
    assert data.classes == ["cat", "dog"]
    # The fixture paints 50 * (domain + 1) red with night first, 100 * (class + 1) green.
    assert torch.equal(data.images[:, 0, 8, 8].long(), 100 - 50 * data.domains)
    assert torch.equal(data.images[:, 1, 8, 8].long(), 100 + 100 * data.labels)


def test_images_are_squares_of_the_size_asked_for(folder):
    assert load_folder(folder, 24).images.shape == (20, 3, 24, 24)


def test_a_fifth_of_each_class_of_each_domain_tests(folder):
    data = load_folder(folder, 16)
    assert torch.equal(data.train, ~data.test)
    groups = (2 * data.domains + data.labels)[data.test]
    assert sorted(groups.tolist()) == [0, 1, 2, 3]


def test_the_whole_held_out_domain_tests(folder):
    data = load_folder(folder, 16, held_out="day")
    assert data.test[data.domains == 0].all()
    assert data.test[data.domains == 1].sum() == 2


def test_folders_named_train_and_test_are_the_official_split(folder):
    (folder / "day").rename(folder / "test")
    (folder / "night").rename(folder / "train")
    data = load_folder(folder, 16)
    # The fixture paints what was night 50 red, what was day 100.
    assert torch.equal(data.test, data.images[:, 0, 8, 8] == 100)
    assert torch.equal(data.train, ~data.test)


def spoil(folder, how):
    """Spoil a folder in this way."""
    dogs = folder / "day" / "dog"
    if how == "stray image":
        shutil.copy(dogs / "0.png", folder / "day" / "stray.png")
    elif how == "no class":
        shutil.rmtree(dogs)
    elif how == "one image":
        for i in range(4):
            (dogs / f"{i}.png").unlink()
    elif how == "no image":
        (folder / "night" / "cat" / "3.png").write_bytes(b"not an image")
    elif how == "one domain":
        shutil.rmtree(folder / "day")
    elif how == "nothing":
        shutil.rmtree(folder)
    elif how == "empty":
        shutil.rmtree(folder)
        (folder / "a" / "b").mkdir(parents=True)


@pytest.mark.parametrize(
    ("how", "held_out", "message"),
    [
        ("stray image", None, r"stray\.png in no class"),
        ("no class", None, "'day' has no images of dog"),
        ("one image", None, r"two images or more a class.*got one in .*dog"),
        ("no image", None, r"cannot read the image .*night.cat.3\.png"),
        ("one domain", "night", "expected a second domain"),
        ("nothing", None, r"none at .*pictures"),
        ("empty", None, "expected images as DOMAIN/CLASS/image"),
        ("", "dusk", r"one of the domains day, night, got 'dusk'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder, how, held_out, message):
    spoil(folder, how)
    with pytest.raises(RecipeError, match=message):
        load_folder(folder, 16, held_out=held_out)


def test_images_in_folders_below_a_class_belong_to_it(folder):
    (folder / "day" / "dog" / "more").mkdir()
    shutil.move(folder / "day" / "dog" / "0.png", folder / "day" / "dog" / "more" / "0.png")
    assert len(load_folder(folder, 16).images) == 20


def test_a_zip_is_loaded_as_its_folder_is(folder, tmp_path):
    zipped = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", folder))
    found, expected = load_folder(zipped, 16), load_folder(folder, 16)
    assert torch.equal(found.images, expected.images)
    assert found.domain_names == expected.domain_names
    assert torch.equal(found.test, expected.test)


def test_chosen_domains_alone_are_loaded_in_their_order(folder):
    data = load_folder(folder, 16, domains=["night", "day"])
    assert data.domain_names == ["night", "day"]
    assert torch.equal(data.images[:, 0, 8, 8].long(), 50 + 50 * data.domains)
    assert load_folder(folder, 16, domains=["night"]).images.shape[0] == 10


def test_a_folder_of_classes_is_one_domain_where_that_is_asked_for(folder):
    data = load_folder(folder / "night", 16, flat=True)
    assert data.domain_names == ["night"]
    assert data.classes == ["cat", "dog"]
    assert data.labels.bincount().tolist() == [5, 5]
    assert load_folder(folder, 16, flat=True).domain_names == ["day", "night"]
    with pytest.raises(RecipeError, match="in no class"):
        load_folder(folder / "night", 16)


def given_split(folder: Path) -> Path:
    """Let the first three images of each class train, and the others test."""
    for path in sorted(folder.rglob("*.png")):
        domain, name = path.relative_to(folder).parts[:2]
        part = folder / domain / ("train" if int(path.stem) < 3 else "test") / name
        part.mkdir(parents=True, exist_ok=True)
        path.rename(part / path.name)
        if not any((folder / domain / name).iterdir()):
            (folder / domain / name).rmdir()
    return folder


def test_the_split_of_a_folder_is_kept_in_each_domain(folder):
    plain = load_folder(folder, 16)
    data = load_folder(given_split(folder), 16)
    assert data.given_split
    assert not plain.given_split
    assert (data.domain_names, data.classes) == (plain.domain_names, plain.classes)
    # The fixture paints 40 * (image + 1) blue, and 100 * (class + 1) green.
    assert torch.equal(data.train, data.images[:, 2, 8, 8] <= 120)
    assert torch.equal(data.test, ~data.train)
    assert torch.equal(data.images[:, 1, 8, 8].long(), 100 + 100 * data.labels)


def test_a_limit_is_of_each_part_of_a_split(folder):
    data = load_folder(given_split(folder), 16, limit=1)
    groups = 4 * data.test + 2 * data.domains + data.labels
    assert groups.bincount().tolist() == [1] * 8


def test_the_parts_alone_are_one_domain_of_the_name_of_the_folder(folder):
    (folder / "night").rename(folder / "train")
    (folder / "day").rename(folder / "test")
    data = load_folder(folder, 16)
    assert data.domain_names == [folder.name]
    assert torch.equal(data.test, data.images[:, 0, 8, 8] == 100)


def test_a_class_without_images_that_test_is_named(folder):
    shutil.rmtree(given_split(folder) / "day" / "test" / "dog")
    with pytest.raises(RecipeError, match="images of 'dog' of 'day' in train and in test"):
        load_folder(folder, 16)


@pytest.fixture
def few(monkeypatch):
    """Let a few files be enough for two processes."""
    monkeypatch.setattr(decoding, "LEAST", 5)


def test_processes_decode_in_order(few, folder):
    paths = sorted(folder.rglob("*.png"))
    images = decoding.decode(paths, 16, workers=2)
    assert images.shape == (20, 16, 16, 3)
    wanted = np.array([Image.open(path).getpixel((0, 0)) for path in paths])
    assert np.array_equal(images[:, 0, 0], wanted)


def test_an_image_that_cannot_be_read_is_told_by_its_process(few, folder):
    paths = sorted(folder.rglob("*.png"))
    paths[7].write_bytes(b"no image")
    with pytest.raises(RecipeError, match=r"cannot read the image .*\.png"):
        decoding.decode(paths, 16, workers=2)
