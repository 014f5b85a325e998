"""Residual blocks whose caller hands them their skip."""

import pytest
import torch
from torch import nn

import normswap
from tests.support.scaling import double, scale_method

__all__ = ["scale_method"]


class Handed(nn.Module):
    """A block whose caller may hand it its skip, as the trees of DLA do."""

    def __init__(self):
        super().__init__()
        self.conv = double(nn.Conv2d(1, 1, 1, bias=False))
        self.bn = nn.BatchNorm2d(1, eps=0.0)

    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = x
        return self.bn(self.conv(x)) + shortcut


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.project.weight, 10.0)
        self.one, self.other = Handed(), Handed()

    def forward(self, x):
        return self.other(self.one(x, self.project(x)))


@pytest.mark.parametrize(
    ("placement", "expected"),
    # one: 2 x + 10 x; other: 2 y + y; with a factor of 3 in both.
    [("pre", 16 * 7), ("residual", 16 * 7), ("identity", 32 * 5), ("post", 36 * 9)],
)
def test_a_block_may_be_handed_its_skip(placement, expected):
    model = normswap.convert(Tree().eval(), "scale", placement=placement, start=3.0)
    assert model(torch.ones(1, 1, 1, 1)).item() == expected


class HandedMore(Handed):
    def forward(self, x, shortcut=None, more=None):
        y = super().forward(x, shortcut)
        return y if more is None else y * 10 + more


def test_a_block_handed_more_than_a_skip_does_not_move_its_layer_in_silence():
    model = normswap.convert(HandedMore().eval(), "scale", placement="post", start=3.0)
    x = torch.ones(1, 1, 1, 1)
    assert model(x, x).item() == 9
    with pytest.raises(normswap.ConversionError, match=r"has 2 residual adds here, had 1"):
        model(x, x, x)
