"""Scores of a segmentation, and a picture of it."""

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
    """Give the mean IoU of each domain that has the part, and by kind; `known`: sources told."""
    scores: dict[str, float] = {}
    names = data.sources if known else [*data.sources, *data.targets]
    for domain, name in enumerate(names):
        chosen = data.where(part, domain)
        if len(chosen):
            found = predict(model, data.images[chosen], data.domains[chosen] if known else None)
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
    """Draw images, truth, and what each method found, a column a scene."""
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    # Around the wheel, neighbours apart; white where no class is known.
    hues = [(0.381966 * i % 1, 0.75, 1.0 - 0.25 * (i % 2)) for i in range(data.classes - 1)]
    colours = torch.ones(256, 3)
    colours[: data.classes] = torch.tensor([(0.0, 0.0, 0.0), *map(tuple, hsv_to_rgb(hues))])
    shown = {"truth": data.masks[scenes], **rows}
    pictures = {name: colours[masks.long()].permute(0, 3, 1, 2) for name, masks in shown.items()}
    pictures = {"image": data.images[scenes] / 255, **pictures}
    size = (1.1 * len(scenes) + 1.2, 1.1 * len(pictures) + 0.6)
    canvas = Figure(figsize=size, dpi=120, layout="constrained")
    axes = canvas.subplots(len(pictures), squeeze=False)[:, 0]
    for axis, (name, images) in zip(axes, pictures.items(), strict=True):
        axis.imshow(make_grid(images, len(scenes), pad_value=1).permute(1, 2, 0).numpy())
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    names = (*data.sources, *data.targets)
    titles = dict.fromkeys(names[int(domain)] for domain in data.domains[scenes])
    canvas.suptitle(f"{title}: {', '.join(titles)}", fontsize=9)
    with atomic(path) as temporary:
        canvas.savefig(temporary, format="png", bbox_inches="tight")
