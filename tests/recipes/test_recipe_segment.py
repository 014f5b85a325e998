import numpy as np
import pytest
import torch
from PIL import Image

import normswap
from recipes import segment
from recipes.__main__ import main
from recipes.common import scenes, scenes_folder
from recipes.common.dense import FCN
from recipes.common.errors import RecipeError
from recipes.common.grid import read_lines
from recipes.common.options import Parser

COUNTS = (6, 2, 4)


@pytest.fixture
def data():
    return scenes.make_scenes(["gravel", "grass"], ["brick"], 48, 0, COUNTS)


@pytest.fixture
def options():
    parser = Parser("segment", "")
    segment.add_options(parser)
    return parser.parse_args(["--batch", "4", "--image-size", "48"])


@pytest.fixture
def folder(tmp_path):
    """Two domains of noise in which class 1 is a bright square; some of it is ignored."""
    draw = np.random.default_rng(0)
    for domain, kind in (("day", "png"), ("night", "jpg")):
        for part in ("images", "masks"):
            (tmp_path / "data" / domain / part).mkdir(parents=True)
        for number in range(9):
            mask = np.zeros((40, 50), np.uint8)
            mask[8:24, 10 + number : 30] = 1
            image = draw.integers(0, 80, (40, 50, 3)) + 150 * mask[..., None]
            mask[:4] = 255
            root = tmp_path / "data" / domain
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{number}.{kind}")
            Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return tmp_path / "data"


def test_the_recipe_runs_end_to_end_and_reports(tmp_path, capsys):
    methods = ["bn", "cnsn", "cn-x"]
    given = ["segment", "--smoke", "--image-size", "32", "--methods", *methods]
    assert main([*given, "--out", str(tmp_path)]) == 0

    run = tmp_path / "segment-smoke"
    assert [r["cell"]["method"] for r in read_lines(run / "results.jsonl")] == methods
    made = {p.name for p in run.iterdir() if not p.name.startswith("masks-")}
    assert made == {
        "config.json", "epochs.jsonl", "results.jsonl", "results.png", "predictions.png",
        "report.txt", "table.json",
    }  # fmt: skip
    assert "everything called class 0: gravel: 8" in capsys.readouterr().out


def test_it_learns_a_folder_of_images_and_masks_and_the_same_again(folder, tmp_path):
    given = ["segment", "--data", str(folder), "--target", "night", "--image-size", "32"]
    given += ["--methods", "cn", "--seeds", "1", "--epochs", "8", "--batch", "2", "--lr", "0.01"]
    given += ["--out", str(tmp_path)]
    for name in ("one", "two"):
        assert main([*given, "--name", name]) == 0

    one, two = (read_lines(tmp_path / name / "epochs.jsonl") for name in ("one", "two"))
    assert one == two
    result = read_lines(tmp_path / "one" / "results.jsonl")[0]
    assert result["target"] > 80  # nothing but background would be about 43
    assert result["source_known"] > 80


def test_every_method_starts_as_the_same_function(data, options):
    images = torch.rand(3, 3, 48, 48)
    plain = segment.build("bn", data, 1, options).eval()(images)
    for method in ("crossnorm", "selfnorm", "cnsn", "cn", "cn-x", "acn"):
        found = segment.build(method, data, 1, options).eval()(images)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_frozen_statistics_are_those_that_all_start_with(data, options):
    images = torch.rand(3, 3, 48, 48)
    plain, frozen = (segment.build(name, data, 1, options) for name in ("bn", "bn-frozen"))
    expected = plain.eval()(images)
    assert not torch.allclose(plain.train()(images), expected)
    assert torch.equal(frozen.train()(images), expected)


@pytest.mark.parametrize(
    ("name", "levels", "blocks"),
    [
        ("resnet10t", [1, 2, 3], 3),
        ("tf_efficientnet_lite0", [1, 2, 3], 9),
        ("hrnet_w18_small", [1, 2], 23),
    ],
)
def test_residual_blocks_of_a_features_only_backbone_are_found(name, levels, blocks):
    model = FCN(name, 5, levels, pretrained=False)
    for method, placement in (("selfnorm", "residual"), ("crossnorm", "post")):
        report = normswap.plan(model, method, placement=placement)
        taken = [row for row in report.rows if row.action == "inserted"]
        assert len(taken) == blocks
        assert all(row.fqn.startswith("backbone.") for row in taken)


def test_cnsn_is_selfnorm_on_the_branches_and_crossnorm_after_the_blocks(data, options):
    model = segment.build("cnsn", data, 0, options)
    rows = [r for r in normswap.summary(model).rows if r.action == "inserted"]
    assert len(rows) == 6
    kinds = (normswap.SelfNorm, normswap.CrossNorm)
    counts = [sum(isinstance(m, kind) for m in model.modules()) for kind in kinds]
    assert counts == [3, 3]


def test_all_norms_of_backbone_and_head_are_replaced():
    model = FCN("resnet10t", 5, [1, 2, 3], pretrained=False)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    converted = normswap.convert(model, "cn", contexts=2, verify=False)
    report = normswap.summary(converted)

    assert report.count(action="replaced") == norms
    # timm's list of features asks for types; all else is threaded.
    assert set(report.opaque) == {"backbone"}


def test_mean_iou_is_overlap_by_union_of_each_class():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (4, 9, 9), generator=draw)
    found = torch.randint(0, 6, (4, 9, 9), generator=draw)  # class 5 is found and nowhere true
    truth[:, 0] = scenes.IGNORED
    shares = []
    for label in range(6):
        ours, theirs = (truth == label), (found == label) & (truth != scenes.IGNORED)
        shares.append((ours & theirs).sum().item() / (ours | theirs).sum().item())

    assert segment.mean_iou(truth, found) == pytest.approx(100 * sum(shares) / 6)


def test_all_background_scores_next_to_nothing(data):
    line = segment.background(data, scenes.TEST)
    pixels, score = (float(part) for part in (line.split()[5], line.split()[11]))
    assert pixels > 75
    assert score < 12


def test_no_digit_of_a_test_scene_is_trained_on(monkeypatch):
    shown = {"train": set(), "test": set()}
    draw = scenes.draw_scene

    def spy(digits, labels, ground, *rest):
        wide = scenes.photograph(rest[0]).shape[2]
        part = "test" if ground.shape[2] == wide - 2 * wide // 3 else "train"
        shown[part] |= {digit.numpy().tobytes() for digit in digits}
        return draw(digits, labels, ground, *rest)

    monkeypatch.setattr(scenes, "draw_scene", spy)
    scenes.make_scenes(["gravel"], ["brick"], 48, 0, (60, 20, 40))
    assert min(map(len, shown.values())) > 50
    assert not shown["train"] & shown["test"]


def test_scenes_are_those_of_their_seed(data):
    again = scenes.make_scenes(["gravel", "grass"], ["brick"], 48, 0, COUNTS)
    other = scenes.make_scenes(["gravel", "grass"], ["brick"], 48, 1, COUNTS)

    assert torch.equal(again.images, data.images)
    assert torch.equal(again.masks, data.masks)
    assert not torch.equal(other.images, data.images)


def test_targets_only_test(data):
    assert set(data.parts[data.domains == 2].tolist()) == {scenes.TEST}
    assert [len(data.where(part, 0)) for part in range(3)] == list(COUNTS)


def test_a_mask_is_cut_as_its_image_and_ignored_beyond_the_edge():
    masks = torch.randint(0, 3, (2, 8, 8))
    images = masks[:, None].expand(-1, 3, -1, -1).float()
    # The identity, and a window that is moved right by half an image.
    windows = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[1.0, 0, 1], [0, 1, 0]]])
    cut_images, cut_masks = scenes.cut(images, masks, windows)

    assert torch.equal(cut_masks[0], masks[0])
    assert torch.equal(cut_masks[1, :, :4], masks[1, :, 4:])
    assert (cut_masks[1, :, 4:] == scenes.IGNORED).all()
    torch.testing.assert_close(cut_images[1, 0, :, :4], masks[1, :, 4:].float())


def test_a_folder_is_read_with_its_classes_and_what_it_ignores(folder):
    read = scenes_folder.read_scenes(folder, None, ["night"], 32)

    assert (read.sources, read.targets, read.classes) == (["day"], ["night"], 2)
    assert read.images.shape == (18, 3, 32, 32)
    assert set(read.masks.unique().tolist()) == {0, 1, scenes.IGNORED}
    parts = scenes_folder.split(read, 0)
    assert [len(parts.where(part, 0)) for part in range(3)] == [6, 1, 2]
    assert [len(parts.where(part, 1)) for part in range(3)] == [0, 0, 9]


def test_every_part_of_a_source_has_a_scene_at_the_least(folder):
    read = scenes_folder.read_scenes(folder, ["day"], ["night"], 32, limit=scenes_folder.LEAST)
    parts = scenes_folder.split(read, 0)
    assert all(len(parts.where(part, 0)) for part in range(3))


def break_mask(folder):
    (folder / "day" / "masks" / "3.png").unlink()


def colour_mask(folder):
    Image.new("RGB", (50, 40)).save(folder / "day" / "masks" / "3.png")


def shrink_mask(folder):
    Image.new("L", (20, 40)).save(folder / "day" / "masks" / "3.png")


def spoil_image(folder):
    (folder / "day" / "images" / "3.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_mask, "expected a mask for .*3.png"),
        (colour_mask, "mode RGB"),
        (shrink_mask, r"image's size \(50, 40\), got \(20, 40\)"),
        (spoil_image, "cannot read"),
    ],
)
def test_a_spoilt_folder_is_an_error_that_names_the_file(folder, spoil, message):
    spoil(folder)
    with pytest.raises(RecipeError, match=message):
        scenes_folder.read_scenes(folder, None, ["night"], 32)


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        (None, None, "--source or --target of the domains .*: day, night"),
        (["dusk"], None, "--source and --target of .* among day, night, got 'dusk'"),
        (["day"], ["day"], "each domain once"),
        (["day", "night"], None, "a domain for --target"),
    ],
)
def test_domains_that_are_not_there_are_named(folder, sources, targets, message):
    with pytest.raises(RecipeError, match=message):
        scenes_folder.read_scenes(folder, sources, targets, 32)
