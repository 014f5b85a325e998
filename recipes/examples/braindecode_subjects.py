"""braindecode: an EEG network in skorch's trainer, the subject of each window its context.

pip install braindecode
python -m recipes.examples.braindecode_subjects
"""

from pathlib import Path

import numpy as np
import torch
from braindecode import EEGClassifier
from braindecode.models import ShallowFBCSPNet
from torch import nn

import normswap

SUBJECTS = ["anna", "bela", "cleo"]


def windows(count, seed):
    """Return noise whose power at 10 Hz tells the hand; the gain is another for each subject."""
    draw = np.random.default_rng(seed)
    hands, subjects = draw.integers(2, size=count), draw.integers(len(SUBJECTS), size=count)
    phases, times = draw.uniform(0, 2 * np.pi, (count, 1)), np.arange(250) / 125
    signals = draw.standard_normal((count, 4, 250))
    signals[np.arange(count), hands] += 0.6 * np.sin(2 * np.pi * 10 * times + phases)
    signals *= np.array([0.2, 1, 6])[subjects, None, None]
    return {"x": signals.astype("float32"), "subject": subjects}, hands


class OfSubjects(nn.Module):
    """Names the arguments that skorch takes out of the dict, whatever the network's are called."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, subject=None):
        return self.network(x, context=subject)


def main(folder="runs/examples/braindecode_subjects"):
    """Train, save and load; return the model and its accuracy on windows not trained on."""
    torch.manual_seed(0)
    original = ShallowFBCSPNet(n_chans=4, n_outputs=2, n_times=250, final_conv_length="auto")
    model = normswap.convert(original, "cn", contexts=SUBJECTS)
    settings = {"optimizer": torch.optim.AdamW, "lr": 0.005, "batch_size": 32, "max_epochs": 4}
    trainer = EEGClassifier(OfSubjects(model), train_split=None, classes=[0, 1], **settings)
    trainer.fit(*windows(480, seed=0))
    signals, hands = windows(300, seed=1)
    score = float((trainer.predict(signals) == hands).mean())
    unknown = float((trainer.predict(signals["x"]) == hands).mean())  # an array: no subject
    print(f"accuracy {score:.3f}, {unknown:.3f} without the names of the subjects")

    normswap.save(model, Path(folder) / "norms")
    loaded = normswap.load(original, Path(folder) / "norms").eval()
    x = torch.from_numpy(signals["x"])
    torch.testing.assert_close(loaded(x, context="cleo"), model.eval()(x, context="cleo"))
    plain = normswap.specialize(loaded, "cleo")  # for Cleo alone: plain batch norms
    torch.testing.assert_close(plain(x), loaded(x, context="cleo"))
    print(f"saved, loaded and specialised to {folder}")
    return model, score


if __name__ == "__main__":
    main()
