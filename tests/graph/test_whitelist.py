"""What a forward may read and do, if a graph is to stand for it: later changes always count."""

import copy

import pytest
import torch
from torch import nn

import normswap
from tests.graph.behave import LABELS, Block, Holder, check, close, images, tensors

SCALE = 1.0
KINDS = (nn.BatchNorm2d, nn.GroupNorm)
SETTINGS = {"scale": 1.0}


class Base(Holder):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.extra = nn.ModuleList()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.b(self.a(x))


class Constant(Base):
    def forward(self, x):
        return super().forward(x) * SCALE


class Item(Base):
    def forward(self, x):
        return super().forward(x) * SETTINGS["scale"]


class OfClass(Base):
    def forward(self, x):
        return super().forward(x) * self.__class__.factor


class Extra(Base):
    def forward(self, x):
        return super().forward(x) * (1 + len(self.extra))


class Tuple(Base):
    def forward(self, x):
        y = super().forward(x)
        return y if isinstance(self.a.norm, KINDS) else y * 3


def set_extra(model, patch):
    model.extra.append(nn.Identity())


def set_base(model, patch):
    patch.setattr(Base, "forward", lambda self, x: self.a(x) * 5)


CHANGES = {
    Constant: lambda model, patch: patch.setitem(globals(), "SCALE", 3.0),
    Item: lambda model, patch: patch.setitem(SETTINGS, "scale", 3.0),
    OfClass: lambda model, patch: patch.setattr(OfClass, "factor", 3.0),
    Extra: set_extra,
    Tuple: set_base,
}


def run(model, **labels):
    with torch.no_grad():
        return tensors(model(images(), **labels))


@pytest.mark.parametrize("cls", CHANGES, ids=lambda cls: cls.__name__)
def test_what_is_changed_later_counts(cls, monkeypatch):
    model = cls().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    close(run(converted, context=LABELS), run(model))
    before = run(model)
    for each in (model, converted):
        CHANGES[cls](each, monkeypatch)
    assert not torch.allclose(run(model)[0], before[0])
    close(run(converted, context=LABELS), run(model))


@pytest.mark.parametrize("cls", [Constant, Extra, Tuple], ids=lambda cls: cls.__name__)
def test_these_have_graphs(cls):
    check(cls())


class Stored(Base):
    def forward(self, x):
        object.__setattr__(self, "last", x.mean())
        return super().forward(x)


class Counted(Base):
    def forward(self, x):
        self._buffers["count"] = self._buffers["count"] + 1
        return super().forward(x) * self.count


class Listed(Base):
    def forward(self, x):
        self._modules["more"] = nn.Identity()
        return self._modules["more"](super().forward(x))


@pytest.mark.parametrize("cls", [Stored, Counted, Listed], ids=lambda cls: cls.__name__)
def test_what_goes_round_a_module_leaves_no_mark(cls):
    model = cls().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    for name in ("_buffers", "_modules"):
        assert list(getattr(converted, name)) == list(getattr(model, name))
    assert type(converted.count) is torch.Tensor
    assert not hasattr(converted, "last")
    twin = copy.deepcopy(model)
    for _ in range(2):
        close(run(converted, context=LABELS), run(twin))
    assert torch.equal(converted.count, twin.count)
    assert isinstance(converted.a, Block)
