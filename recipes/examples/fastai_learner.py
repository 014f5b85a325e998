"""fastai: a block for the context makes it a second input, which the Learner passes to the model.

pip install fastai
python -m recipes.examples.fastai_learner
"""

from pathlib import Path

import timm
from fastai import torch_core
from fastai.vision import all as fastai

import normswap
from normswap.methods.layer import ContextLayer
from recipes.examples.scanners import SCANNERS, Digits

# By this list fastai spares norms from weight decay, and trains them where it freezes the body.
torch_core.norm_types += (ContextLayer,)


def main(folder="runs/examples/fastai"):
    """Train, save and load; return the loaded model and its accuracy."""
    fastai.set_seed(0)
    train, valid = Digits(train=True, size=16), Digits(train=False, size=16)
    rows = ((image, int(digit), scanner) for image, digit, scanner in (*train, *valid))
    items = fastai.L(rows)  # no list, of which a DataBlock writes every element into a message
    # Two inputs: an image (ImageBlock for files), its context in the order of SCANNERS.
    scanner, digit = fastai.CategoryBlock(SCANNERS, sort=False), fastai.CategoryBlock(range(10))
    block = fastai.DataBlock(
        blocks=(fastai.TransformBlock, scanner, digit), n_inp=2,
        getters=[fastai.ItemGetter(0), fastai.ItemGetter(2), fastai.ItemGetter(1)],
        splitter=fastai.IndexSplitter(range(len(train), len(items))),
    )  # fmt: skip
    data = block.dataloaders(items, bs=60, device="cpu", num_workers=0)

    original = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    model = normswap.convert(original, "cn", contexts=SCANNERS)  # of a vision_learner: its .model
    loss = fastai.CrossEntropyLossFlat()
    learner = fastai.Learner(data, model, loss_func=loss, metrics=fastai.accuracy)
    with learner.no_bar():
        learner.fit_one_cycle(5, 0.01)

    # fastai's own file holds a converted model; normswap's what changed since the conversion.
    normswap.save(model, Path(folder) / "norms")
    learner.path = Path(folder)
    learner.export()
    learner = fastai.load_learner(Path(folder) / "export.pkl")
    learner.model = normswap.load(original, Path(folder) / "norms")
    with learner.no_bar():
        _, score = learner.validate(dl=learner.dls.test_dl(items[len(train) :], with_labels=True))
    print(f"accuracy {score:.3f}, after loading {folder}/norms")
    return learner.model, score


if __name__ == "__main__":
    main()
