"""Parts of a model that a forward finds outside of it, or behind objects: refused, with why."""

import weakref
from collections import deque

import pytest
from torch import nn

import normswap
from tests.support.behave import Block

PARTS, BY_NAME = [], {}


class Slotted:
    __slots__ = ("act", "empty")

    def __init__(self, act):
        self.act = act


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm2d(4)
        self.hold()

    def hold(self):
        pass

    def forward(self, x):
        return self.run(self.block(x))


class OfGlobal(Base):
    def hold(self):
        PARTS[:] = [self.norm]

    def run(self, x):
        return PARTS[0](x)


class OfHelper(Base):
    def hold(self):
        BY_NAME["norm"] = self.norm

    def run(self, x):
        return named(x)


def named(x):
    return BY_NAME["norm"](x)


class OfClass(Base):
    def hold(self):
        norm = self.norm
        type(self).act = staticmethod(lambda x: norm(x))

    def run(self, x):
        return self.act(x)


class OfSlot(Base):
    def hold(self):
        self.held = Slotted(self.norm)

    def run(self, x):
        return self.held.act(x)


class OfSlottedFunction(Base):
    def hold(self):
        norm = self.norm
        self.held = Slotted(lambda x: norm(x))

    run = OfSlot.run


class OfDeque(Base):
    def hold(self):
        norm = self.norm
        self.held = deque([lambda x: norm(x)])

    def run(self, x):
        return self.held[0](x)


class OfProxy(Base):
    def hold(self):
        self.__dict__["held"] = weakref.proxy(self.norm)

    def run(self, x):
        return self.held(x)


CLASSES = [OfGlobal, OfHelper, OfClass, OfSlot, OfSlottedFunction, OfDeque, OfProxy]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_norm_that_would_go_on_running_is_refused(cls, inplace):
    model = cls()
    way_out = "exclude=|inplace=True" if not inplace else "exclude="
    with pytest.raises(normswap.ConversionError, match=rf"cannot co(py|nvert).*({way_out})"):
        normswap.convert(model, "cn", inplace=inplace)
    assert type(model.norm) is nn.BatchNorm2d
    assert type(normswap.convert(model, "cn", exclude="norm", inplace=True).norm) is nn.BatchNorm2d


def test_a_global_that_no_forward_names_is_in_nobodys_way():
    class Free(Base):
        hold = OfGlobal.hold

        def run(self, x):
            return self.norm(x)

    assert type(normswap.convert(Free(), "cn").norm) is not nn.BatchNorm2d
