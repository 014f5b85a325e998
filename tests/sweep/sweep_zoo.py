"""Models for the tests of the sweep: one of each kind of trouble."""

import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions with batch norms, pooled."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))

    def forward(self, x):
        return self.second(self.first(x)).mean((2, 3))


class OfBatch(Net):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0)


class Random(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(5)


class TextAsking(Net):
    """Computes something else once its norms print other settings."""

    def forward(self, x):
        y = super().forward(x)
        return y if "track_running_stats" in repr(self.first[1]) else 2 * y


class Reordering(Net):
    """Its norms see the samples in another order than the check of training takes them to have."""

    def forward(self, x):
        return super().forward(x.flip(0)).flip(0)


class Deaf(Net):
    """Nothing of its input reaches its output."""

    def forward(self, x):
        return super().forward(x) * 0


class Chaotic(Net):
    """Doubles every rounding error eighty times over."""

    def forward(self, x):
        y = super().forward(x).sigmoid()
        for _ in range(80):
            y = 3.99 * y * (1 - y)
        return y


class Raising(Net):
    def forward(self, x):
        raise ValueError("no forward today")


@dataclass
class Output:
    logits: Tensor
    features: dict[str, Tensor]
    name: str = "net"


class Structured(Net):
    """Takes keyword arguments, gives a dataclass."""

    def forward(self, pixels, scale=None):
        y = super().forward(pixels)
        return Output(y if scale is None else y * scale, {"first": self.first(pixels)})


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def endless():
    time.sleep(600)


def models():
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scale = torch.arange(1.0, 5).unsqueeze(1)
    yield "good", Net, images
    yield "structured", Structured, {"pixels": images, "scale": scale}
    yield "no-norms", lambda: nn.Conv2d(3, 4, 1), images
    yield "of-batch", OfBatch, images
    yield "random", Random, images
    yield "text-asking", TextAsking, images
    yield "reordering", Reordering, images
    yield "deaf", Deaf, images
    yield "chaotic", Chaotic, images
    yield "raising", Raising, images
    yield "killed", killed, images
    yield "endless", endless, images


def twice():
    yield "same", Net, torch.ones(2, 3, 8, 8)
    yield "same", Net, torch.ones(2, 3, 8, 8)
