"""fastai: a block for the context makes it a second input, which the Learner passes to the model.

pip install fastai
python -m recipes.examples.fastai_learner
"""

from pathlib import Path

import timm
from fastai import torch_core
from fastai.vision.all import (
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    IndexSplitter,
    ItemGetter,
    Learner,
    TransformBlock,
    accuracy,
    load_learner,
    set_seed,
)

import normswap
from normswap.methods.layer import ContextLayer
from recipes.examples.digits import SCANNERS, Digits

# By this list fastai spares norms from weight decay, and trains them where it freezes the body.
torch_core.norm_types += (ContextLayer,)


def rows():
    """Return (image, name of the scanner, class) of all digits, and which of them validate."""
    train, valid = Digits(train=True, size=16), Digits(train=False, size=16)
    items = [(image, scanner, int(c)) for part in (train, valid) for image, c, scanner in part]
    return items, range(len(train), len(items))


def main(folder="runs/examples/fastai"):
    """Train, save and load; return the loaded model and its accuracy."""
    set_seed(0)
    items, valid = rows()
    block = DataBlock(
        # Of two inputs: the image (ImageBlock for files) and the context, in the order of SCANNERS.
        blocks=(TransformBlock, CategoryBlock(SCANNERS, sort=False), CategoryBlock),
        n_inp=2,
        getters=[ItemGetter(0), ItemGetter(1), ItemGetter(2)],
        splitter=IndexSplitter(valid),
    )
    data = block.dataloaders(items, bs=60, device="cpu")

    original = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    model = normswap.convert(original, "cn", contexts=SCANNERS)  # then the Learner
    settings = {"loss_func": CrossEntropyLossFlat(), "metrics": accuracy, "path": Path(folder)}
    learner = Learner(data, model, **settings)
    with learner.no_bar():
        learner.fit_one_cycle(6, 0.01)

    # fastai's own file holds the Learner with the converted model, normswap's what was trained.
    learner.export("learner.pkl")
    again = load_learner(Path(folder) / "learner.pkl")
    normswap.save(model, Path(folder) / "norms")
    again.model = normswap.load(original, Path(folder) / "norms")
    with again.no_bar():
        predictions, classes = again.get_preds(dl=again.dls.test_dl(items[-597:], with_labels=True))
    score = accuracy(predictions, classes).item()
    print(f"accuracy {score:.3f}, after loading {folder}/norms")
    return again.model, score


if __name__ == "__main__":
    main()
