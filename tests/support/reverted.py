"""Norms of every class, converted to be reverted."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import normswap
from tests.support.builders import SKEWED, random_

METHODS = ["cn", "cn-x"]
EACH = pytest.mark.parametrize("method", METHODS)
NAMES = ["a", "b", "c"]


class Odd(nn.BatchNorm2d):
    """A batch norm with things of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.note = ["kept"]
        self.names = "not those of contexts"
        self.register_buffer("seen", torch.ones(2))
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        self.extra = nn.Linear(1, 1)


def frozen(channels, **settings):
    return torchvision.ops.FrozenBatchNorm2d(channels, **settings)


def act(channels):
    norm = timm.layers.BatchNormAct2d(channels, act_layer=nn.PReLU)
    norm.drop = nn.Dropout(0.1)
    return norm


MAKERS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None, eps=1e-2),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm2d": frozen,
    "BatchNormAct2d": act,
    "InstanceNorm2d": nn.InstanceNorm2d,
    "affine InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True),
    "tracked InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "subclass": Odd,
}
EVERY_NORM = pytest.mark.parametrize("kind", MAKERS)


def make_norm(kind):
    norm = MAKERS[kind](4).eval()
    for seed, (name, tensor) in enumerate(norm.state_dict().items()):
        if tensor.is_floating_point():
            random_(tensor, seed, *((-1, 1) if name in ("bias", "running_mean") else (0.5, 2)))
    return norm


def make(kind, method, norm=None):
    norm = make_norm(kind) if norm is None else norm
    base = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    return base, normswap.convert(base, method, contexts=NAMES, priors=SKEWED)
