"""Scores of a segmentation, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from .runs import atomic
from .scenes import IGNORED, Scenes


def mean_iou(truth: Tensor, found: Tensor) -> float:
    """Give the mean of intersection over union of the classes that occur or were found, in %."""
    known = truth != IGNORED
    return 100 * float(jaccard_score(truth[known], found[known], average="macro"))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, context: Tensor | None = None) -> Tensor:
    """Give the classes (N, H, W) uint8 of uint8 images, with or without their contexts."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for rows in torch.arange(len(images)).split(100):
        given = {} if context is None else {"context": context[rows].to(device)}
        scores = model(images[rows].to(device).float() / 255, **given)
        found.append(scores.argmax(1).to("cpu", torch.uint8))
    return torch.cat(found)


def evaluate(model: nn.Module, data: Scenes, part: int, known: bool = False) -> dict[str, float]:
    """Give the mean IoU of each domain that has the part, and of sources and targets together.

    With `known`, of the sources alone, with the domain as label.
    """
    scores: dict[str, float] = {}
    for domain, name in enumerate((*data.sources, *data.targets)):
        chosen = data.where(part, domain)
        if len(chosen) and not (known and domain >= len(data.sources)):
            context = data.domains[chosen] if known else None
            found = predict(model, data.images[chosen], context)
            scores[f"on_{name}"] = mean_iou(data.masks[chosen], found)
    for kind, names in (("source", data.sources), ("target", data.targets)):
        if values := [scores[f"on_{name}"] for name in names if f"on_{name}" in scores]:
            scores[kind] = sum(values) / len(values)
    return scores


def background(data: Scenes, part: int) -> str:
    """Say what calling everything background scores on a part."""
    lines = []
    for domain, name in enumerate((*data.sources, *data.targets)):
        truth = data.masks[data.where(part, domain)]
        score = mean_iou(truth, torch.zeros_like(truth))
        pixels = 100 * (truth[truth != IGNORED] == 0).float().mean().item()
        lines.append(f"{name}: {pixels:.1f} % of pixels, mean IoU {score:.1f} %")
    return "everything called class 0: " + "; ".join(lines)


def draw_predictions(
    path: Path, data: Scenes, scenes: Tensor, rows: dict[str, Tensor], title: str
) -> None:
    """Draw images, truth, and what each method found, a column a scene.

    Args:
        path: the PNG to write.
        data: of which the scenes are.
        scenes: (n,) indices.
        rows: method -> masks (n, S, S).
        title: heading of the picture.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    names: Sequence[str] = (*data.sources, *data.targets)
    colours = ListedColormap(_colours(data.classes))
    pictures: dict[str, Tensor] = {"image": data.images[scenes], "truth": data.masks[scenes]}
    pictures.update(rows)
    canvas = Figure(figsize=(1.1 * len(scenes) + 1.2, 1.1 * len(pictures) + 0.6), dpi=120)
    axes = canvas.subplots(len(pictures), len(scenes), squeeze=False)
    for line, (name, shown) in zip(axes, pictures.items(), strict=True):
        for column, (axis, scene) in enumerate(zip(line, shown, strict=True)):
            if name == "image":
                axis.imshow(scene.permute(1, 2, 0).numpy())
                domain = int(data.domains[scenes[column]])
                kind = "source" if domain < len(data.sources) else "target"
                axis.set_title(f"{names[domain]}\n({kind})", fontsize=7)
            else:
                mask = scene.float().masked_fill(scene == IGNORED, torch.nan).numpy()
                axis.imshow(mask, colours, vmin=0, vmax=data.classes - 1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    canvas.suptitle(title, fontsize=9, y=1.0)
    canvas.subplots_adjust(hspace=0.04, wspace=0.04)
    with atomic(path) as temporary:
        canvas.savefig(temporary, format="png", bbox_inches="tight")


def _colours(classes: int) -> list[tuple[float, float, float]]:
    """Give black, then colours around the wheel, neighbours apart."""
    from matplotlib.colors import hsv_to_rgb

    hues = [(0.381966 * i % 1, 0.75, 1.0 - 0.25 * (i % 2)) for i in range(classes - 1)]
    return [(0.0, 0.0, 0.0), *(tuple(hsv_to_rgb(hue)) for hue in hues)]
