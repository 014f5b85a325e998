"""Values that may be None, compared, passed on or returned."""

import pytest
from torch import nn

from tests.support.behave import CHANNELS, Block, Holder, check


class Maybe(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.on = on

    def forward(self, x):
        return self.norm(x) if self.on else None


class Named(Block):
    def forward(self, x):
        return {"out": super().forward(x)}


def mean_or_none(x, on):
    return x.mean() if on else None


def test_none_from_a_child():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.off, self.on = Maybe(False), Maybe(True)

        def forward(self, x):
            y = self.a(x)
            for value in (self.off(x), self.on(x)):
                if value is not None:
                    y = self.b(y) * 2 + value
            return y

    check(Model(), opaque="is None, known only")


class Uncertain(Holder):
    def __init__(self):
        super().__init__()
        self.maybe, self.asks = Maybe(False), True


class InOneLine(Uncertain):
    def forward(self, x):
        y = self.b(self.a(x))
        return y if (found := self.maybe(x)) is None else y * found


class OfTwo(Uncertain):
    def forward(self, x):
        y = self.b(self.a(x))
        return y * 2 if (self.maybe(x) if self.asks else x) is None else y


class TheOtherOfTwo(Uncertain):
    def forward(self, x):
        y, found = self.b(self.a(x)), self.maybe(x)
        return y * 2 if (found if self.asks else x) is None else y


class InAList(Uncertain):
    def forward(self, x):
        y, found = self.b(self.a(x)), [self.maybe(x)]
        return y * len([value for value in found if value is None])


@pytest.mark.parametrize("kind", [InOneLine, OfTwo, TheOtherOfTwo, InAList])
def test_none_wherever_an_expression_takes_it_from(kind):
    check(kind(), opaque="is None, known only")


def test_none_from_a_function():
    class Model(Holder):
        def forward(self, x):
            mask = mean_or_none(x, False)
            return self.a(x) if mask is None else self.a(x) * 3

    check(Model())


def test_none_from_a_dict():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.named = Named()

        def forward(self, x):
            found = self.named(x)
            other = found.get("other")
            return found["out"] if other is None else other

    check(Model(), opaque="is None, known only")


def test_none_in_a_tuple_from_a_child():
    class Two(Block):
        def forward(self, x):
            return super().forward(x), None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            y, extra = self.two(x)
            return y if extra is None else y * 3

    check(Model(), opaque="is None, known only")


def test_a_sum_that_starts_with_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([nn.Sequential(nn.ReLU(), Block()) for _ in range(2)])

        def forward(self, x):
            total = None
            for branch in self.branches:
                total = branch(x) if total is None else total + branch(x)
            return total

    check(Model(), opaque="is None, known only")


def test_attributes_compared_with_none_are_traced():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.extra = None

        def forward(self, x):
            y = self.a(x)
            return self.b(y) if self.extra is None else self.extra(y)

    check(Model())
