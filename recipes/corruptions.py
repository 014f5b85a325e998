"""`python -m recipes corruptions`: train on clean images, test on corrupted ones.

The corruptions are fourteen of ImageNet-C's fifteen families, all but frost, at five severities, on
images held out at random; no training image is corrupted. Figures are those of the last epoch.

    crossnorm selfnorm cnsn    in residual blocks, where convert puts them by default
    mixstyle efdmix dsu        after the stages where their authors have them
    ...+jsd                    and consistency with two CrossNorm passes (crossnorm and cnsn)
    ...+augmix                 and consistency with two AugMix versions of the images
    ...+augmix+jsd             and both (crossnorm and cnsn)

The default is small so that nine methods and three seeds take about 13 minutes of one thread:
digits of 24 px, six epochs. A folder has its domains mixed, in training and in the test; at 64 px
EfficientNet-Lite0 costs about 9 ms an image to train and 3 ms to test, of which there are 71 of
each test image: take `--images-per-class 30` and fewer methods on a CPU.

AugMix leaves out what its authors leave out, since the test is made of it or close to it: contrast,
brightness, colour, sharpness. What stays and comes near to a test: autocontrast and equalisation
(contrast), rotation, shear and translation (the affine part of elastic_transform).
"""

from argparse import Namespace
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from .common import grid, images, methods, reports
from .common.corrupt import FAMILIES, GROUPS, SEVERITIES, corrupt
from .common.data import TEST_BATCH, DomainData, Loader, validation
from .common.losses import WITHOUT_CROSSNORM as SAME
from .common.options import Parser
from .common.training import Log, train

# NORMS, or NORMS+LOSS.
METHODS = (
    *("bn", "crossnorm", "selfnorm", "cnsn", "mixstyle", "crossnorm+jsd", "cnsn+jsd"),
    *("bn+augmix", "cnsn+augmix", "cnsn+augmix+jsd"),
)
NORMS = {"bn": False, "crossnorm": True, "selfnorm": False, "cnsn": True}  # whether of CrossNorm
NORMS |= dict.fromkeys(("mixstyle", "efdmix", "dsu"), False)
OVERLAP = ("ContrastIncreasing", "BrightnessIncreasing", "ColorIncreasing", "SharpnessIncreasing")
FIGURES = {"clean": "clean", **{group: group for group in GROUPS}, "corrupted": "all corrupted"}
RELATIVE = "mCE, bn = 100"
Data = tuple[DomainData, dict[str, dict[int, Tensor]]]  # and its corruptions, by severity


def run(options: Namespace) -> None:
    images.settle(options)

    folder, records = grid.run(
        options, "corruptions", data_of, train_one, right,
        before=lambda data: images.build(options, data[0], 0),
    )  # fmt: skip
    compared, notes = relative(records)
    more = {"mce": RELATIVE} if any(r.get("mce") is not None for r in compared) else {}
    source = "digits" if options.data is None else options.data.resolve().name
    title = f"error on corrupted images: {source}, {options.model}, {options.image_size} px"
    families = reports.table(compared, {name: name for name in FAMILIES})
    notes = [
        "errors in %, means over families and severities; mean +- standard deviation over seeds",
        "mCE is a mean of ratios: a family in which bn is hardly ever wrong weighs as much as any, "
        "so a few more errors there can outweigh fewer errors in all",
        f"by family, severities together\n\n{families}",
        *notes,
    ]
    how = {"unit": "error, %", "notes": notes}
    reports.show(folder, compared, FIGURES, title, more, "corrupted", **how)


def data_of(config: Namespace) -> Data:
    """Load the images, and corrupt those that test in every way."""
    data, seed = images.load_mixed(config, config.seed), config.seed
    clean = data.images[data.test]
    return data, {
        name: {severity: corrupt(clean, name, severity, seed) for severity in SEVERITIES}
        for name in FAMILIES
    }


def train_one(given: Data, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model; give its errors."""
    data, corrupted = given
    norms, _, loss = config.method.partition("+")
    config.loss = loss or "ce"
    if not config.final:
        data, corrupted = validation(data), {}
    model, loader, _ = images.build(config, data, config.seed, without=OVERLAP)
    model = methods.convert(model, norms, None, example_inputs=(images.example(loader),))
    train(config.method, model, loader, config, log)
    return errors(model, loader, corrupted)


def right(record: dict[str, Any]) -> float:
    """Give the accuracy in per cent on clean images."""
    return float(100 - record["clean"])


@torch.inference_mode()
def errors(
    model: nn.Module, loader: Loader, corrupted: dict[str, dict[int, Tensor]]
) -> dict[str, Any]:
    """Measure the error in per cent: clean, by family and severity, by group, over all families.

    Without corrupted images, on clean ones alone.
    """
    model.eval()
    data = loader.data
    labels = data.labels[data.test]

    def error(pixels: Tensor) -> float:
        parts = pixels.split(TEST_BATCH)
        found = torch.cat([model(loader.normalised(part)).argmax(1).cpu() for part in parts])
        return 100 * int((found != labels).sum()) / len(labels)

    result: dict[str, Any] = {"clean": error(data.images[data.test])}
    if not corrupted:
        return result
    each = {name: [error(x) for x in levels.values()] for name, levels in corrupted.items()}
    result |= {name: mean(values) for name, values in each.items()}
    result |= {group: mean(result[name] for name in names) for group, names in GROUPS.items()}
    result["corrupted"] = mean(result[name] for name in each)
    return {**result, "by_severity": each}


def relative(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Add "mce": the mean error in per cent of bn's of the seed, over families in which bn errs."""
    plain = {r["cell"]["seed"]: r for r in records if r["cell"]["method"] == "bn"}
    found, notes = [], []
    for seed, bn in plain.items():
        if left_out := [name for name in FAMILIES if not bn[name] > 0]:
            notes.append(
                f"seed {seed}: bn makes no error in {', '.join(left_out)}, left out of mCE"
            )
    for record in records:
        bn = plain.get(record["cell"]["seed"], {})
        ratios = [100 * record[name] / bn[name] for name in FAMILIES if bn.get(name, 0) > 0]
        found.append({**record, "mce": mean(ratios) if ratios else None})
    return found, notes


def known() -> tuple[str, ...]:
    """Give every norm with every loss; without CrossNorm some losses would be another's."""
    losses = [(f"+{loss}".replace("+ce", ""), own == loss) for loss, own in SAME.items()]
    return tuple(n + loss for loss, any_norm in losses for n in NORMS if any_norm or NORMS[n])


def add_options(parser: Parser) -> None:
    grid.add_methods(parser, METHODS, known())
    images.add_options(parser)
