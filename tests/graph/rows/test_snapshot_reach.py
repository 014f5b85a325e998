"""What a forward changes by way of functions, methods, objects and other files is put back."""

import functools
import types
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import normswap
from normswap.graph.rows.snapshot import Snapshot
from tests.support.behave import LABELS, Holder, images

LOG, BIG = [], torch.zeros(3)
N = 0
SETTINGS = types.ModuleType("settings_of_a_user")
SETTINGS.inner = types.ModuleType("settings_of_a_user.inner")


def tick():
    global N
    N += 1


def make():
    n = 0

    def count():
        nonlocal n
        n += 1

    return count, lambda: n


class Meter:
    calls = 0

    def update(self):
        tick()

    def __add__(self, other):
        tick()
        return other

    def up(self):
        self.calls += 1


class Side(nn.Module):
    def extra(self):
        tick()

    def forward(self, x):
        return x


class Cached:
    @functools.cached_property
    def value(self):
        tick()
        return 1.0


METER, PAIR = Meter(), frozenset([Meter()])
FUNCTIONS, BY_NAME = [tick], {"tick": tick}
WEAK, SEEN = weakref.ref(METER), weakref.WeakKeyDictionary()
logs = functools.partial(LOG.append, 1)


def up(_):
    SETTINGS.calls += 1
    SETTINGS.inner.calls += 1


def cached(_):
    Cached().value  # noqa: B018


def note(model):
    SEEN[model] = SEEN.get(model, 0) + 1


WAYS = {  # what a forward does with its model, and how often it was done
    "a function in an attribute": (lambda m: m.tick(), lambda m: N),
    "a variable around one": (lambda m: m.count(), lambda m: m.get()),
    "a method of a list in an attribute": (lambda m: m.add(1), lambda m: len(LOG)),
    "a partial function": (lambda m: logs(), lambda m: len(LOG)),
    "a function in a list": (lambda m: [f() for f in FUNCTIONS], lambda m: N),
    "a function in a dict": (lambda m: BY_NAME["tick"](), lambda m: N),
    "a method of an object": (lambda m: METER.update(), lambda m: N),
    "a bound method in an attribute": (lambda m: m.up(), lambda m: m.up.__self__.calls),
    "an operator": (lambda m: METER + 1, lambda m: N),
    "a cached property": (cached, lambda m: N),
    "another method of a child": (lambda m: m.side.extra(), lambda m: N),
    "another file": (up, lambda m: SETTINGS.calls),
    "a file in another": (up, lambda m: SETTINGS.inner.calls),
    "a weak reference": (lambda m: WEAK().up(), lambda m: METER.calls),
    "a weak dict": (note, lambda m: SEEN.get(m, 0)),
    "a frozen set": (lambda m: [p.up() for p in PAIR], lambda m: next(iter(PAIR)).calls),
}


class Model(Holder):
    act = None

    def __init__(self):
        super().__init__()
        self.side, self.tick, self.add, self.up = Side(), tick, LOG.append, Meter().up
        self.count, self.get = make()

    def forward(self, x):
        self.act()
        return self.b(self.a(x))


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_measuring_rows_does_not_count(way, trace, monkeypatch):
    act, done = WAYS[way]
    monkeypatch.setattr(Model, "act", act)
    SETTINGS.calls = SETTINGS.inner.calls = 0
    converted = normswap.convert(Model(), "cn", contexts=3, trace=trace)
    before = done(converted)
    expected = [before + 1, before + 2]
    for times in expected:
        converted(images(), context=LABELS)
        assert done(converted) == times


def test_a_big_tensor_in_what_no_forward_calls_is_not_copied():
    """A method that no code names may lead to data."""

    class Loads(Holder):
        def load(self):
            return BIG

        def forward(self, x):
            return self.b(self.a(x))

    snapshot = Snapshot(normswap.convert(Loads(), "cn", contexts=3))
    assert not any(tensor is BIG for tensor, _, _ in snapshot._tensors)


class Registry(OrderedDict):
    """As transformers' table of activations: what it returns is no entry of it."""

    def __getitem__(self, name):
        return super().__getitem__(name)()

    def __setitem__(self, name, value):
        raise TypeError

    clear = update = values = items = __iter__ = None


REGISTRY = Registry()
OrderedDict.__setitem__(REGISTRY, "relu", nn.ReLU)


class WithTools(Holder):
    """Names a module of Python's and one of torch's, which its class has."""

    tools, layer = SETTINGS, nn.Identity()

    def forward(self, x):
        y = self.b(self.a(self.layer(x))) * getattr(self.tools, "gain", 1)
        return y + REGISTRY["relu"].training


def test_collections_of_own_methods_and_modules_in_classes_stay_as_they_are():
    converted = normswap.convert(WithTools(), "cn", contexts=3)
    converted(images(), context=LABELS)
    assert [*OrderedDict.items(REGISTRY)] == [("relu", nn.ReLU)]


def test_code_that_imports_beside_itself_and_what_a_tool_wrote_into_it():
    def forward(module, x):
        from . import test_snapshot  # noqa: F401, its name in the code is empty

        assert x.ndim == 4  # of which pytest makes calls of its own
        return module.b(module.a(x))

    class Imports(Holder):
        pass

    Imports.forward = forward
    assert "" in forward.__code__.co_names
    assert any(name.startswith("@") for name in forward.__code__.co_names)
    converted = normswap.convert(Imports(), "cn", contexts=3)
    converted(images(), context=LABELS)
    named = (name for _, names, *_ in Snapshot(converted)._tables for name in names or ())
    assert not any(name.startswith("@") for name in named)
