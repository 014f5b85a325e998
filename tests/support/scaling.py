"""A method that multiplies by a factor, and a block: where the factor sits shows in the output."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import normswap
from normswap.methods.base import InsertedMethod


class Scale(nn.Module):
    """Multiplies by a factor that starts at one: the place it sits at shows in the output."""

    def __init__(self, start):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x):
        return x * self.factor


@dataclass(frozen=True)
class ScaleOptions:
    start: float = 1.0


@pytest.fixture(autouse=True, scope="module")
def scale_method():
    from normswap.methods import registry

    @normswap.register_method
    class ScaleMethod(InsertedMethod):
        name = "scale"
        title = "a factor"
        options = ScaleOptions

        def insert(self, place, options):
            layer = Scale(options.start)
            layer.place = place
            return layer

    yield
    del registry._REGISTRY["scale"]


def double(module):
    """Stand for a layer: known weights make the arithmetic of a block checkable by hand."""
    nn.init.constant_(module.weight, 2.0)
    return module


class Basic(nn.Module):
    """y = relu(2 * 2 * x + x), as 1x1 convolutions of one channel."""

    def __init__(self, swap=False, downsample=False, inplace=False):
        super().__init__()
        self.conv1 = double(nn.Conv2d(1, 1, 1, bias=False))
        self.bn1 = nn.BatchNorm2d(1, eps=0.0)
        self.conv2 = double(nn.Conv2d(1, 1, 1, bias=False))
        self.downsample = double(nn.Conv2d(1, 1, 1, bias=False)) if downsample else nn.Identity()
        self.act = nn.ReLU()
        self.swap = swap
        self.inplace = inplace

    def forward(self, x):
        shortcut = self.downsample(x)
        out = self.conv2(self.bn1(self.conv1(x)))
        if self.inplace:
            out += shortcut
        else:
            out = shortcut + out if self.swap else out + shortcut
        return self.act(out)


def output(block, placement, start, x=1.0):
    model = normswap.convert(block.eval(), "scale", placement=placement, start=start)
    return model(torch.full((1, 1, 1, 1), x)).item(), model
