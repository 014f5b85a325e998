"""timm: its optimizer factory with layer decay, scheduler, EMA, and mixup within contexts.

python -m recipes.examples.timm_style
"""

from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch.utils.data import DataLoader

import normswap
from recipes.examples.scanners import SCANNERS, Digits, accuracy


def mixed_within_contexts(mixup, images, classes, labels):
    """Mix samples of one context with each other only.

    Mixup takes the batch reversed: over a whole batch it makes images of two contexts, which no
    label is right for. It wants an even number, so of an odd one the last is left out.

    Returns:
        Images, soft classes and labels, ordered by context.
    """
    parts = []
    for label in labels.unique():
        (mine,) = (labels == label).nonzero(as_tuple=True)
        mine = mine[: len(mine) // 2 * 2]
        parts.append((*mixup(images[mine], classes[mine]), labels[mine]))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def main(folder="runs/examples/timm"):
    """Train, save and load the averaged model; return it and its accuracy."""
    random_seed(0)
    original = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    model = normswap.convert(original, "cn", contexts=SCANNERS)  # then the optimizer, then the EMA

    # The factory gets the model, not its parameters: it then spares the norms of contexts, too.
    optimizer = create_optimizer_v2(model, "adamw", lr=0.003, weight_decay=0.05, layer_decay=0.9)
    average = ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.1, num_classes=10)
    criterion = SoftTargetCrossEntropy()
    loader = DataLoader(Digits(train=True, size=16), batch_size=60, shuffle=True, drop_last=True)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=6)
    for epoch in range(epochs):
        model.train()
        scheduler.step(epoch)
        for images, classes, scanners in loader:
            labels = torch.tensor([SCANNERS.index(name) for name in scanners])
            images, targets, labels = mixed_within_contexts(mixup, images, classes, labels)
            loss = criterion(model(images, context=labels), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    # The average is a converted model of its own.
    normswap.save(average.module, Path(folder) / "norms")
    loaded = normswap.load(original, Path(folder) / "norms")
    score = accuracy(loaded, size=16)
    print(f"accuracy {score:.3f} of the average, after loading {folder}/norms")
    return loaded, score


if __name__ == "__main__":
    main()
