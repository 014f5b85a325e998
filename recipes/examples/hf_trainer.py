"""Hugging Face's Trainer: a collator turns the names of contexts into labels.

pip install transformers accelerate
python -m recipes.examples.hf_trainer
"""

from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

import normswap
from recipes.examples.scanners import SCANNERS, Digits


class Rows(Dataset):
    """The digits as Trainer takes them. It drops columns that no forward takes: say context."""

    def __init__(self, train):
        self.digits = Digits(train)

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        image, label, scanner = self.digits[index]
        return {"pixel_values": image, "labels": label, "context": scanner}


def collate(rows):
    """Collate rows: the default collator keeps integers but drops strings without a word.

    In training the model then raises; in evaluation it takes the contexts for unknown.
    """
    labels = [SCANNERS.index(row["context"]) for row in rows]
    return {**transformers.default_data_collator(rows), "context": torch.tensor(labels)}


def share_right(prediction):
    """Return the accuracy, as `compute_metrics` wants it."""
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


def main(folder="runs/examples/hf_trainer", rows=Rows, collator=collate):
    """Train, save and load; return the loaded model and its accuracy."""
    set_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    config = ResNetConfig(num_channels=1, num_labels=10, layer_type="basic", **sizes)
    original = ResNetForImageClassification(config)  # or .from_pretrained(NAME)
    model = normswap.convert(original, "cn", contexts=SCANNERS)

    sizes = {"per_device_train_batch_size": 60, "per_device_eval_batch_size": 200}
    quiet = {"save_strategy": "no", "report_to": "none", "dataloader_drop_last": True}
    steps = {"num_train_epochs": 4, "learning_rate": 0.01, "use_cpu": True}
    arguments = TrainingArguments(folder, **steps, **sizes, **quiet)
    data = {"train_dataset": rows(train=True), "eval_dataset": rows(train=False)}
    trainer = Trainer(model, arguments, collator, **data, compute_metrics=share_right)
    trainer.train()

    # Trainer's own checkpoints resume its run; `from_pretrained` cannot build a converted model.
    normswap.save(model, Path(folder) / "norms")
    trainer.model = normswap.load(original, Path(folder) / "norms")
    score = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {score:.3f}, after loading {folder}/norms")
    return trainer.model, score


if __name__ == "__main__":
    main()
