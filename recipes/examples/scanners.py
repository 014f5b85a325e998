"""What the examples train on, in place of your data and network: digits of three scanners."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

SCANNERS = ["clear", "negative", "faint"]


class Digits(Dataset):
    """scikit-learn's digits, each seen by one scanner: (image, class, name of the scanner)."""

    def __init__(self, train, size=8):
        pixels, classes = load_digits(return_X_y=True)
        part = slice(1200) if train else slice(1200, None)
        images = torch.tensor(pixels[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.images = nn.functional.interpolate(images, size=(size, size))
        self.classes = torch.tensor(classes[part])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        scanner = SCANNERS[index % 3]
        image = self.images[index]
        seen = {"clear": image, "negative": 1 - image, "faint": 0.3 + image / 10}[scanner]
        return seen, self.classes[index], scanner


def network():
    """Return a small convolutional network with three batch norms."""

    def block(inputs, outputs, stride):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    body = block(1, 16, 1), block(16, 32, 2), block(32, 32, 2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model, size=8):
    """Return the share of test digits that a converted model gets right, their scanner known."""
    ((images, classes, scanners),) = DataLoader(Digits(False, size), batch_size=1000)
    return (model.eval()(images, context=scanners).argmax(1) == classes).float().mean().item()
