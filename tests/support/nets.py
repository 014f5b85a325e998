"""A small network of a stem, two blocks and a head."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn(self.conv(x)).relu()


class Net(nn.Module):
    """A stem, two blocks and a head; every tensor of its norms is random."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.layer_norm = nn.LayerNorm(4)
        self.num_classes = 5
        self.head = nn.Linear(4, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, tensor in module.state_dict().items():
                    if name != "num_batches_tracked":
                        tensor.uniform_(0.5, 1.5)

    def features(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.layer_norm(x.mean((2, 3)))

    def forward(self, x):
        return self.head(self.features(x))


def images(n=6):
    return torch.randn(n, 3, 9, 9)
