"""An order that follows a setting of the model is measured anew where the setting changes."""

import enum
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import normswap
from tests.support.rows import LABELS, K, N, apart, singly


class Order(enum.Enum):
    AS_IS = 0
    FLIPPED = 1


@dataclass
class Config:
    flip: bool


# How a model keeps its setting, and how it reads it.
SETTINGS = {
    "dict": (lambda flip: {"flip": flip}, lambda kept: kept["flip"]),
    "nested dict": (lambda flip: {"rows": {"flip": flip}}, lambda kept: kept["rows"]["flip"]),
    "namespace": (lambda flip: types.SimpleNamespace(flip=flip), lambda kept: kept.flip),
    "list": (lambda flip: [flip], lambda kept: kept[0]),
    "tuple": (lambda flip: ("rows", flip), lambda kept: kept[1]),
    "dataclass": (Config, lambda kept: kept.flip),
    "enum": (Order, lambda kept: kept is Order.FLIPPED),
    "number": (int, lambda kept: kept == 1),
}


class Flip(nn.Module):
    """A layer without parameters or children."""

    def __init__(self, kept, read):
        super().__init__()
        self.kept = kept
        self.read = read

    def forward(self, x):
        return x.flip(0) if self.read(self.kept) else x


class Flipping(Flip):
    def __init__(self, kept, read):
        super().__init__(kept, read)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return Flip.forward(self, self.norm(Flip.forward(self, x)))


@pytest.mark.parametrize(("keep", "read"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("in_a_leaf", [True, False])
def test_a_setting_that_changes_the_order_of_samples(keep, read, in_a_leaf):
    if in_a_leaf:
        layer = Flip(keep(False), read)
        model = nn.Sequential(layer, nn.BatchNorm1d(6), layer)
    else:
        model = Flipping(keep(False), read)
    model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
    for flip in (False, True, False):
        (model[0] if in_a_leaf else model).kept = keep(flip)
        x = torch.randn(N, 6, dtype=torch.float64)
        torch.testing.assert_close(model(x, context=LABELS), singly(model, x))
