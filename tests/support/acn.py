"""ACN layers and a net with one, for the tests of ACN."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from normswap import AdaptiveContextNorm
from tests.support.builders import random_

ASSIGNMENTS = ["channel", "position", "instance"]
STATISTICS = ["batch", "learned"]
EVERY = [{"statistics": s, "assignment": a} for s in STATISTICS for a in ASSIGNMENTS]
EVERY_KIND = pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(o.values()))


def make_acn(channels=4, components=3, dtype=torch.float64, **settings):
    layer = AdaptiveContextNorm(channels, components, dtype=dtype, **settings)
    ranges = {
        "weight": (0.5, 1.5),
        "mu": (-1, 2),
        "log_sigma": (-0.3, 0.5),
        "running_var": (0.5, 2),
    }
    for seed, (name, tensor) in enumerate(layer.state_dict().items()):
        if tensor.is_floating_point():
            random_(tensor, seed, *ranges.get(name, (-1, 1)))
    return layer


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(4, dtype=dtype)
        self.head = nn.Linear(4, 2, dtype=dtype)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3)))


def make_net(training=False, **options):
    torch.manual_seed(0)
    base = Net().eval()
    random_(base.norm.running_mean, 1, -1, 1)
    random_(base.norm.running_var, 2, 0.5, 2)
    return base, normswap.convert(base, "acn", **options).train(training)


def make_bimodal(samples=16, positions=16):
    """Return a channel with modes at -2 and 2, and what each value is relative to its mode."""
    generator = torch.Generator().manual_seed(0)
    mode = (torch.rand(samples, 1, positions, generator=generator) < 0.5).double() * 4 - 2
    within = 0.5 * torch.randn(samples, 1, positions, generator=generator, dtype=torch.float64)
    return mode + within, within / 0.5
