"""`python -m recipes generate`: a DCGAN at 32 px with context-aware norms in both networks.

Contexts are classes, and make a conditional generator of `cn` and `cn-x`: `generator(noise,
context=classes)` draws the classes asked for. So does `bn-onehot`, BatchNorm told the class beside
its input (one-hot, beside the noise and as planes beside the image): the usual way, and the row to
read `cn` against. `bn` and `acn` know of no class and draw what they like. To the discriminator the
context is the class of a real image, and of a generated one the class it was asked for.

Images are scikit-learn's digits, or with `--data DIR` those of a folder DIR/CLASS/image, such as a
domain of PACS. The Frechet distance is to images held out from everything, in features of a
classifier trained on the training digits, or for a folder in EfficientNet-Lite0's of ImageNet. Of
conditional generators, a classifier on these features says how often it finds the class asked for.
The row `real` is of training images, as many as are generated: what copying them would get.
`bn-frozen`, for `--methods`, keeps the statistics that both networks start with, those of a few
hundred images: a control, a network without batch statistics as `cn-x` is one.

All methods have DCGAN's own settings (Adam 2e-4, betas 0.5 and 0.999, batch 64, weights N(0,
0.02)), tuned for none. Figures are of the last epoch, norms in eval mode; classes are asked for as
often as they occur.
"""

from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from normswap import plot

from .common import digits, folders, gan, grid, reports, runs
from .common.data import stratified_mask
from .common.errors import check
from .common.frechet import Judge, frechet_distance, imagenet_judge, small_judge
from .common.options import Parser, count, resolve
from .common.training import LARGE, Log, check_finite, takes_context

METHODS = ("bn", gan.ONEHOT, "cn", "cn-x", "acn")
DISTANCE, ASKED = {"distance": "Frechet distance"}, {"accuracy": "class as asked, %"}
HEADINGS = DISTANCE | ASKED
COLUMNS = 10
GENERATED = 1000
SMOKE_IMAGES = 256


@dataclass(frozen=True)
class Images:
    """Training images, and what judges generated ones.

    `judge` was made from the training images alone; `held_out` are its features of images that
    nothing was trained on; `asked` are the labels generated images are asked for, those of random
    training images, and `real` the figures of these training images themselves.

    Shape: images (N, C, 32, 32) in [-1, 1]; labels (N,); held_out (M, D).
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    judge: Judge
    held_out: Tensor
    asked: Tensor
    real: dict[str, float]
    note: str


def load(root: Path | None, smoke: bool, device: torch.device) -> Images:
    """Load the images, hold some out and make the judge: the same for every training."""
    if root is None:
        pixels, labels, classes = digits.source()
        images = digits.draw(pixels, gan.SIZE) * 2 - 1
    else:
        images, labels, classes = read_folder(root)
    generator = torch.Generator().manual_seed(0)
    if smoke and len(images) > SMOKE_IMAGES:
        kept = stratified_mask(labels, SMOKE_IMAGES / len(images), generator)
        images, labels = images[kept], labels[kept]
    test = stratified_mask(labels, 0.3 if root is None else 0.2, generator)
    others, truth = images[test], labels[test]
    images, labels = images[~test], labels[~test]
    expected = f"expected {gan.BATCH} images or more to train on, a batch"
    check(len(images) >= gan.BATCH, f"{expected}, got {len(images)}")
    make_judge = small_judge if root is None else imagenet_judge
    judge = make_judge(images, labels, len(classes), device)
    held_out = judge.features(others)
    shown = torch.randperm(len(images), generator=generator)[:GENERATED]
    copied, asked = judge.features(images[shown]), labels[shown]
    real = {"distance": frechet_distance(held_out, copied)}
    real["accuracy"] = judge.accuracy(copied, asked)
    note = (
        f"{len(images):,} training images of {len(classes)} classes, {len(others)} held out; "
        f"judge: {judge.name}, {judge.accuracy(held_out, truth):.1f} % right on held-out images"
    )
    return Images(images, labels, classes, judge, held_out, asked, real, note)


def read_folder(root: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Give the images of a folder CLASS/image at 32 px in [-1, 1], labels, names of classes."""
    data = folders.load_folder(root, gan.SIZE, flat=True)
    one = f"give one domain, such as --data {root / data.domain_names[0]}"
    expected = f"expected images as CLASS/image in {root}; of a folder DOMAIN/CLASS/image, {one}"
    check(data.domain_names == [root.resolve().name], expected)
    two = f"expected two folders of classes or more in {root}"
    check(len(data.classes) > 1, f"{two}, got {data.classes}")
    return data.images.float() / 127.5 - 1, data.labels, data.classes


def run(options: Namespace) -> None:
    resolve(options, backbone=False, epochs=2, every=1, width=8)
    data = load(options.data, options.smoke, options.device)
    print(data.note)
    folder, records = grid.run(options, "generate", lambda _: data, train_one)
    rows = [(data.labels == c).nonzero().flatten()[:COLUMNS] for c in range(len(data.classes))]
    save_samples(folder / "samples-real.png", data.images[torch.cat(rows)])
    draw_epochs(folder, records, data.real)
    real = {"cell": {"method": "real"}, **data.real}
    title = "Frechet distance to held-out images"
    how = {"compared": "distance", "notes": [data.note], "unit": "distance"}
    reports.show(folder, [real, *records], DISTANCE, title, ASKED, **how)


def train_one(data: Images, config: Namespace, log: Log) -> dict[str, Any]:
    """Train both networks; give the figures of the last epoch."""
    given = data.classes, config.width, data.images, data.labels, config.seed
    pair = gan.build(config.method, *given).to(config.device)
    nets = (pair.generator, pair.discriminator)
    optimizers = [torch.optim.Adam(net.parameters(), config.lr, (0.5, 0.999)) for net in nets]
    figures: dict[str, Any] = {}
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed * LARGE + epoch)
        order = torch.randperm(len(data.images), generator=generator)
        order = order[: len(order) // gan.BATCH * gan.BATCH]  # the rest would be a small batch
        pair.train()
        losses = []
        for chosen in order.split(gan.BATCH):
            noise = torch.randn(len(chosen), gan.NOISE, generator=generator)
            batch = (t.to(config.device) for t in (data.images[chosen], data.labels[chosen], noise))
            losses.append(gan.train_step(pair, *optimizers, *batch))
        loss = torch.stack(losses).mean(0).tolist()
        check_finite(sum(loss), f"of {config.method} in epoch {epoch + 1}", config.lr)
        line = {"epoch": epoch + 1, "discriminator": loss[0], "generator": loss[1]}
        if (epoch + 1) % config.every == 0 or epoch + 1 == config.epochs:
            features = data.judge.features(generate(pair, data.asked, seed=2))
            figures = {"distance": frechet_distance(data.held_out, features)}
            if takes_context(pair.generator):
                figures["accuracy"] = data.judge.accuracy(features, data.asked)
            line |= figures
        log(line)
    if config.seed == 0:
        asked = torch.arange(len(data.classes)).repeat_interleave(COLUMNS)
        made = generate(pair, asked, seed=1)
        save_samples(config.folder / f"samples-{config.method}.png", made)
    return figures


@torch.no_grad()
def generate(pair: gan.Pair, labels: Tensor, seed: int) -> Tensor:
    """Generate images of these classes in eval mode; give them on the CPU."""
    pair.generator.eval()
    device = next(pair.generator.parameters()).device
    noise = torch.randn(len(labels), gan.NOISE, generator=torch.Generator().manual_seed(seed))
    parts = zip(noise.split(256), labels.split(256), strict=True)
    return torch.cat([pair.make(z.to(device), y.to(device)).cpu() for z, y in parts])


def save_samples(path: Path, pictures: Tensor) -> None:
    """Write images as one picture, `COLUMNS` a row."""
    with runs.atomic(path) as temporary:
        save_image(pictures, temporary, "png", nrow=COLUMNS, normalize=True, value_range=(-1, 1))


def draw_epochs(folder: Path, records: list[dict[str, Any]], real: dict[str, float]) -> None:
    """Draw the figures over the epochs, means over the seeds."""
    lines = [line for line in grid.read_lines(folder / grid.EPOCHS) if "distance" in line]
    epochs = sorted({line["epoch"] for line in lines})
    panels = {text: {"real": [real[key]] * len(epochs)} for key, text in HEADINGS.items()}
    for key, method in product(HEADINGS, reports.by_method(records)):
        found = [line for line in lines if line["cell"]["method"] == method and key in line]
        if found:
            by_epoch = ([line[key] for line in found if line["epoch"] == e] for e in epochs)
            panels[HEADINGS[key]][method] = list(map(mean, by_epoch))
    plot.curves(panels, epochs, log=[HEADINGS["distance"]], path=folder / "epochs.png")


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS, (*METHODS, "cn-x-batch", "bn-frozen"))
    parser.share("data", epochs=100, lr=2e-4)
    add = parser.add_argument
    add("--every", type=count, default=10, help="epochs a judgement")
    add("--width", type=count, default=16, help="of both networks")
