"""Lightning: the names of contexts ride in the batch, `use_context` gives them to the model.

pip install lightning
python -m recipes.examples.lightning_module
"""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import normswap
from recipes.examples.scanners import SCANNERS, Digits, accuracy, network


class Task(lightning.LightningModule):
    """Converts its network in `__init__`, so that checkpoints load without more ado."""

    def __init__(self, method="cn"):
        super().__init__()
        self.save_hyperparameters()
        self.model = normswap.convert(network(), method, contexts=SCANNERS)

    def training_step(self, batch, _):
        images, classes, scanners = batch  # scanners: a tuple of names
        with normswap.use_context(self, scanners):
            loss = cross_entropy(self.model(images), classes)
        self.log("loss", loss, prog_bar=True, batch_size=len(classes))
        return loss

    def validation_step(self, batch, _):
        images, classes, scanners = batch
        # The same by an argument; the block is for forwards that pass none on, such as a loss's.
        right = self.model(images, context=scanners).argmax(1) == classes
        self.log("accuracy", right.float().mean(), batch_size=len(classes))

    def configure_optimizers(self):
        return torch.optim.AdamW(normswap.param_groups(self.model, lr=0.003, weight_decay=0.05))


def main(folder="runs/examples/lightning"):
    """Train, and load the checkpoint; return the loaded model and its accuracy."""
    lightning.seed_everything(0)
    quiet = {"logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer("cpu", max_epochs=5, default_root_dir=folder, **quiet)
    # Of several processes (strategy="ddp") each has its samples: batch statistics of all need
    # normswap.convert_sync_batchnorm(self.model) in __init__.
    train = DataLoader(Digits(train=True), batch_size=60, shuffle=True, drop_last=True)
    task = Task()
    trainer.fit(task, train, DataLoader(Digits(train=False), batch_size=200))
    logged = trainer.callback_metrics["accuracy"].item()

    path = trainer.checkpoint_callback.best_model_path
    loaded = Task.load_from_checkpoint(path).eval()
    score = accuracy(loaded.model)
    print(f"accuracy {logged:.3f}, and {score:.3f} after loading {path}")
    return loaded.model, score


if __name__ == "__main__":
    main()
