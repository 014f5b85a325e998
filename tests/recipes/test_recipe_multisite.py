import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import multisite
from recipes.__main__ import main
from recipes.common.errors import RecipeError
from recipes.common.grid import read_lines
from recipes.common.options import Parser, of_cell
from recipes.common.scenes import IGNORED, TEST, TRAIN, VALID
from recipes.common.scenes_folder import read_sites
from recipes.common.weights import make_features


@pytest.fixture(scope="module")
def data(sites):
    return read_sites(sites, 64)


@pytest.fixture
def config(sites):
    parser = Parser("multisite", "")
    multisite.add_options(parser)
    given = ["--data", str(sites), "--patch", "32", "--batch-size", "4", "--steps", "2"]
    options = parser.parse_args([*given, "--model", "resnet10t_narrow"])
    return of_cell(options, seed=0)


def run(sites, tmp_path, *given):
    given = ["--data", str(sites), "--smoke", *given, "--out", str(tmp_path), "--name", "run"]
    assert main(["multisite", *given]) == 0
    return read_lines(tmp_path / "run" / "results.jsonl")


def test_every_method_is_tested_on_each_site_by_what_it_is_told(sites, tmp_path):
    methods = ["bn", "cn", "cn-x-batch", "bn-frozen"]
    results = run(sites, tmp_path, "--methods", *methods)

    told = {"known", "pooled", "posterior", "most confident"}
    found = {r["cell"]["method"]: r["accuracy"] for r in results}
    assert list(found) == methods
    for method, accuracy in found.items():
        assert set(accuracy) == (told if method.startswith("cn") else {""})
        assert all(set(a) == {"east", "west"} for a in accuracy.values())
    report = (tmp_path / "run" / "report.txt").read_text()
    assert "AUC east" in report
    assert "above bn" in report


def test_rates_are_chosen_without_what_tests(data, config):
    config.method, config.final, config.amp = "cn", False, True
    config.device = torch.device("cpu")
    spoilt = replace(data, images=data.images.clone())
    spoilt.images[data.parts == TEST] = 0
    one, other = (multisite.train_one(scenes, config, lambda _: None) for scenes in (data, spoilt))
    assert one == other
    assert set(one["accuracy"]["known"]) == {"east", "west"}


def test_an_added_context_adapts_as_batch_norm_does_and_leaves_the_own_site(sites, tmp_path):
    results = run(sites, tmp_path, "--adapt", "east", "--methods", "bn", "cn", "cn-x-batch")
    own = [r["more"] for r in results]
    assert [set(more) for more in own] == [{"", "adapted"}] * 3
    assert own[0]["adapted"] != own[0][""]
    assert own[1]["adapted"] == own[1][""]
    assert own[2]["adapted"] == own[2][""]
    # With one context CN is BatchNorm, and its new one has what AdaBN measures.
    bn, cn, _ = (r["accuracy"] for r in results)
    for told in ("", "adapted"):
        assert cn[told]["west"] == pytest.approx(bn[told]["west"], abs=0.5)


def test_every_method_starts_as_the_same_function(data, config):
    pictures = torch.rand(2, 3, 48, 56)
    for name in (*multisite.METHODS, "bn-frozen"):
        config.method = name
        found = multisite.build(config, data).eval()(pictures)
        if name == "bn":
            plain = found
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_packaged_weights_keep_their_statistics(data, config):
    config.model, config.weights, config.method = (
        "tf_efficientnet_lite0",
        "efficientnet-lite0",
        "bn",
    )
    model = multisite.build(config, data)
    wanted = make_features(config.model, config.levels, False, config.weights)
    norm = wanted.bn1.running_mean
    assert norm.abs().sum() > 0
    assert torch.equal(model.backbone.bn1.running_mean, norm)
    assert not torch.equal(model.joins[0][1].running_mean, torch.zeros(1))


def test_a_site_is_read_with_its_split_and_its_edge_is_ignored(sites, data):
    assert data.sources == ["east", "west"]
    assert data.images.shape == (14, 3, 64, 64)
    for site in range(2):
        sizes = [len(data.where(part, site)) for part in (TRAIN, VALID, TEST)]
        assert sizes == [4, 1, 2]
    west = data.domains == 1
    assert (data.masks[west][:, :, 56:] == IGNORED).all()
    assert (data.masks[west][:, :, :56] != IGNORED).all()
    last = data.images[data.where(VALID, 0)[0]].permute(1, 2, 0)
    assert np.array_equal(last, np.asarray(Image.open(sites / "east/train/images/4.png")))


def test_a_zip_is_read_as_its_folder(sites, data, tmp_path):
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", sites)
    found = read_sites(tmp_path / "zipped.zip", 64)
    assert zipped
    assert torch.equal(found.images, data.images)
    assert torch.equal(found.masks, data.masks)


def test_patches_are_windows_of_training_images_and_of_their_masks(data, config):
    chosen = data.where(TRAIN)
    mirrored = 0
    for seed in range(4):
        pictures, masks, places = multisite.patches(data, data.sources, (TRAIN,), config, seed)
        for picture, mask, site in zip(pictures, masks, places, strict=True):
            whole = torch.cat([data.images.float() / 255, data.masks[:, None].float()], 1)
            part = torch.cat([picture, mask[None].float()])
            windows = whole[chosen].unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5)
            for side, seen in enumerate((part, part.flip(2))):
                # Those with the same first line, of which few are.
                at = (windows[..., 0, :] == seen[:, 0]).all(-1).all(-1).nonzero().tolist()
                at = [place for place in at if torch.equal(windows[tuple(place)], seen)]
                if at:
                    assert data.domains[chosen[at[0][0]]] == site
                    mirrored += side
                    break
            else:
                raise AssertionError("a patch is no window of a training image")
    assert 0 < mirrored < 16


def test_dice_is_twice_the_overlap_by_the_sizes_of_both():
    generator = torch.Generator().manual_seed(0)
    likely = torch.rand(3, 7, 8, generator=generator)
    masks = torch.randint(2, (3, 7, 8), generator=generator).to(torch.uint8)
    masks[:, :, 6:] = IGNORED
    total = 0.0
    for image in range(3):
        both = size = 0
        for y in range(7):
            for x in range(6):
                found, true = float(likely[image, y, x]) > 0.5, int(masks[image, y, x]) == 1
                both, size = both + (found and true), size + found + true
        total += 200 * both / size / 3
    assert multisite.dice_of(likely, masks) == pytest.approx(total)


def test_one_site_or_other_masks_are_an_error(sites, tmp_path):
    copy = shutil.copytree(sites, tmp_path / "copy")
    Image.new("L", (64, 64), 255).save(copy / "east/train/masks/0.png")
    Image.new("L", (64, 64), 3).save(copy / "east/train/masks/1.png")
    with pytest.raises(RecipeError, match="masks of 0 and 1"):
        read_sites(copy, 64)
    shutil.rmtree(copy / "west")
    with pytest.raises(RecipeError, match=r"two sites or more.*got east"):
        read_sites(copy, 64)
