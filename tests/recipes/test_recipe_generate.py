import copy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from recipes import generate
from recipes.__main__ import main
from recipes.common import gan
from recipes.common.errors import RecipeError
from recipes.common.frechet import Judge, frechet_distance
from recipes.common.grid import read_lines
from recipes.common.training import takes_context

CLASSES = ["a", "b", "c"]
METHODS = ("bn", gan.ONEHOT, "cn", "cn-x", "acn")


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return torch.rand(gan.BATCH, 1, 32, 32) * 2 - 1, torch.arange(gan.BATCH) % 3


def build(method, batch, seed=0):
    return gan.build(method, CLASSES, 4, *batch, seed)


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_every_method_starts_from_the_same_function(method, batch):
    images, labels = batch
    noise = torch.randn(len(labels), gan.NOISE)
    made, scored = [], []
    for name in ("bn", method):
        pair = build(name, batch)
        pair.generator.eval(), pair.discriminator.eval()
        made.append(pair.make(noise, labels))
        scored.append(pair.score(images, labels))
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored[1], scored[0], rtol=1e-4, atol=1e-5)


def test_statistics_start_from_those_of_images(batch):
    images, _ = batch
    pair = build("bn", batch)
    conv, _, hidden, norm = pair.discriminator[:4]
    seen = hidden(F.leaky_relu(conv(images), 0.2))
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_are_told_the_class_learn_from_it(method, batch):
    images, labels = batch
    pair = build(method, batch)
    nets = (pair.generator, pair.discriminator)
    optimizers = [torch.optim.Adam(n.parameters(), 1e-2) for n in nets]
    for _ in range(3):
        gan.train_step(pair, *optimizers, images, labels, torch.randn(len(labels), gan.NOISE))
    pair.generator.eval(), pair.discriminator.eval()
    noise = torch.randn(4, gan.NOISE)
    made = [pair.make(noise, torch.full((4,), c)) for c in range(2)]
    scored = [pair.score(images, torch.full_like(labels, c)) for c in range(2)]

    conditional = method not in ("bn", "acn")
    assert takes_context(pair.generator) == conditional
    assert torch.equal(*made) != conditional
    assert torch.equal(*scored) != conditional


def test_frozen_statistics_stay_those_of_the_start(batch):
    images, labels = batch
    for method in ("bn", "bn-frozen"):
        pair = build(method, batch)
        nets = (pair.generator, pair.discriminator)
        before = [dict(copy.deepcopy(net).named_buffers()) for net in nets]
        optimizers = [torch.optim.Adam(net.parameters(), 1e-2) for net in nets]
        gan.train_step(pair, *optimizers, images, labels, torch.randn(len(labels), gan.NOISE))
        same = [
            torch.equal(value, old[name])
            for net, old in zip(nets, before, strict=True)
            for name, value in net.named_buffers()
        ]
        assert all(same) == any(same) == (method == "bn-frozen")
        scores = []
        for mode in (True, False):
            pair.discriminator.train(mode)
            scores.append(pair.score(images, labels))
        assert torch.equal(*scores) == (method == "bn-frozen")


def descend(loss, net):
    parameters = list(net.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= 0.1 * grad


def test_a_step_is_that_of_dcgan(batch):
    images, labels = batch
    ours = build("bn", batch)
    theirs = copy.deepcopy(ours)
    noise = torch.randn(len(labels), gan.NOISE)
    sgd = [torch.optim.SGD(n.parameters(), 0.1) for n in (ours.generator, ours.discriminator)]
    loss = gan.train_step(ours, *sgd, images, labels, noise)

    g, d = theirs.generator, theirs.discriminator
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    cost = F.binary_cross_entropy_with_logits
    of_d = cost(d(images), one) + cost(d(g(noise).detach()), zero)
    descend(of_d, d)
    of_g = cost(d(g(noise)), one)
    descend(of_g, g)

    torch.testing.assert_close(loss, torch.stack((of_d, of_g)).detach())
    for mine, other in ((ours.generator, g), (ours.discriminator, d)):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_the_recipe_runs_reports_and_repeats_itself(tmp_path, capsys):
    given = ["generate", "--smoke", "--out", str(tmp_path), "--name"]
    assert main([*given, "one"]) == 0
    assert main([*given, "two", "--methods", "cn"]) == 0

    folder = tmp_path / "one"
    results = read_lines(folder / "results.jsonl")
    assert [r["cell"]["method"] for r in results] == list(METHODS)
    assert [r["cell"]["method"] for r in results if "accuracy" in r] == [gan.ONEHOT, "cn", "cn-x"]
    samples = {f"samples-{name}.png" for name in ("real", *METHODS)}
    assert {p.name for p in folder.iterdir()} == samples | {
        "config.json", "epochs.jsonl", "epochs.png", "results.jsonl", "results.png", "report.txt",
        "table.json",
    }  # fmt: skip
    assert "Frechet distance" in capsys.readouterr().out
    lines = [(tmp_path / name / "epochs.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [line for line in lines[0] if '"cn"' in line] == lines[1]
    samples = [(tmp_path / name / "samples-cn.png").read_bytes() for name in ("one", "two")]
    assert samples[0] == samples[1]


def test_a_generator_learns_to_draw_the_class_asked_for():
    """Of images that are light on the left in one class, and on the right in the other."""
    labels = torch.arange(64) % 2
    half = torch.where(torch.arange(32) < 16, 0.6, -0.6)
    images = torch.stack((half, -half))[labels].reshape(-1, 1, 1, 32).expand(-1, 1, 32, 32)
    images = images + 0.05 * torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    pair = gan.build(gan.ONEHOT, ["left", "right"], 4, images, labels, 0)
    nets = (pair.generator, pair.discriminator)
    optimizers = [torch.optim.Adam(n.parameters(), 4e-3, (0.5, 0.999)) for n in nets]
    for _ in range(45):
        gan.train_step(pair, *optimizers, images, labels, torch.randn(64, gan.NOISE))

    made = generate.generate(pair, torch.tensor([0, 1]).repeat_interleave(20), seed=0)
    left, right = (made[..., :16] - made[..., 16:]).mean((1, 2, 3)).split(20)
    assert right.max() < -0.3
    assert left.min() > 0.3


def test_training_images_and_held_out_ones_are_apart(monkeypatch):
    body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    judge = Judge("toy", body, lambda features: features.argmax(1), torch.device("cpu"))
    monkeypatch.setattr(generate, "small_judge", lambda *_: judge)
    data = generate.load(None, False, torch.device("cpu"))
    assert len(data.images) + len(data.held_out) == 1797
    assert len(data.asked) == 1000
    assert data.images.shape[1:] == (1, 32, 32)
    assert data.images.aminmax() == (-1, 1)
    kept, held_out = (
        {row.numpy().tobytes() for row in rows} for rows in (body(data.images), data.held_out)
    )
    assert not kept & held_out
    # A copied training set must look better than noise.
    noise = body(2 * torch.rand(1000, 1, 32, 32) - 1)
    assert data.real["distance"] < 0.01 * frechet_distance(data.held_out, noise)
    assert "held out" in data.note


@pytest.fixture
def pictures(tmp_path):
    """Two classes of 60 images, red ones and blue ones."""
    root = tmp_path / "pictures"
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (root / name).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (40, 30), tuple(c + i % 20 for c in colour)).save(
                root / name / f"{i}.png"
            )
    return root


def test_a_folder_is_classes_of_images(pictures, tmp_path):
    given = ["--data", str(pictures), "--smoke", "--methods", "cn", "--out", str(tmp_path / "runs")]
    assert main(["generate", *given]) == 0

    report = (tmp_path / "runs" / "generate-smoke" / "report.txt").read_text()
    assert "64 training images of 2 classes, 16 held out" in report
    assert "EfficientNet-Lite0" in report
    assert "100.0 % right on held-out images" in report


def test_a_folder_of_another_layout_is_an_error(pictures, tmp_path):
    with pytest.raises(RecipeError, match=r"of a folder DOMAIN/CLASS/image, give one domain"):
        generate.read_folder(pictures.parent)
    with pytest.raises(RecipeError, match="none at"):
        generate.read_folder(tmp_path / "nothing")
    for path in (pictures / "red").iterdir():
        path.unlink()
    Image.new("RGB", (40, 30)).save(pictures / "red" / "only.png")
    with pytest.raises(RecipeError, match=r"got one in .*red"):
        generate.read_folder(pictures)


def test_too_few_images_are_an_error(pictures):
    for path in pictures.glob("*/[2-4]*.png"):
        path.unlink()
    with pytest.raises(RecipeError, match="expected 64 images or more to train on"):
        generate.load(pictures, False, torch.device("cpu"))


def test_losses_that_are_not_finite_are_an_error(tmp_path, capsys):
    given = ["--smoke", "--methods", "bn", "--lr", "1e30", "--out", str(tmp_path)]
    assert main(["generate", *given]) == 2
    assert "try a smaller --lr" in capsys.readouterr().err
