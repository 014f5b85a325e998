"""A loop of your own: names of contexts from the dataset; save, load, specialise, export.

python -m recipes.examples.plain
"""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import normswap
from recipes.examples.scanners import SCANNERS, Digits, accuracy, network


def main(folder="runs/examples/plain"):
    """Train, then take the model through what comes after; return it and its accuracy."""
    torch.manual_seed(0)
    original = network()
    model = normswap.convert(original, "cn", contexts=SCANNERS)
    print(normswap.summary(model))

    groups = normswap.param_groups(model.train(), lr=0.003, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups)
    loader = DataLoader(Digits(train=True), batch_size=60, shuffle=True, drop_last=True)
    for epoch in range(4):
        for images, classes, scanners in loader:  # scanners: 60 strings, as the default collates
            loss = cross_entropy(model(images, context=scanners), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    score = accuracy(model)
    print(f"accuracy {score:.3f}, the scanner known")

    # The folder has what changed since the conversion; the base is the model from before it.
    normswap.save(model, Path(folder) / "norms")
    loaded = normswap.load(original, Path(folder) / "norms").eval()
    images = torch.stack([Digits(train=False)[i][0] for i in range(0, 30, 3)])  # all clear
    expected = model(images, context="clear")
    torch.testing.assert_close(loaded(images, context="clear"), expected)

    # One scanner in use: plain batch norms, for any tool that knows nothing of contexts.
    plain = normswap.specialize(loaded, "clear").eval()
    torch.testing.assert_close(plain(images), expected)
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(plain, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, Path(folder) / "clear.pt2")

    # All scanners in use: labels are an input of the program, int64; -1 is an unknown scanner.
    labels = torch.tensor([SCANNERS.index("clear")] * len(images))
    shapes = {"input": {0: batch}, "context": {0: batch}}
    program = torch.export.export(
        loaded, (images,), kwargs={"context": labels}, dynamic_shapes=shapes
    )
    torch.testing.assert_close(program.module()(images[:4], context=labels[:4]), expected[:4])
    print(f"saved, loaded, specialised and exported to {folder}")
    return model, score


if __name__ == "__main__":
    main()
