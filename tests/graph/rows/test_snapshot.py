"""What forwards can reach is put back after runs that must leave no trace."""

import itertools
import os
import queue
import random
import threading
import types
from array import array
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap.graph.rows.snapshot import Snapshot
from tests.support.behave import LABELS, Holder, close, images

COUNTS = {"calls": 0, "of": {"each": [0]}}
TOTAL = torch.zeros(2)
IDS = itertools.count()
RECENT = OrderedDict(a=1, b=2)
N = 0


class Log:
    lines = 0


def tick():
    tick.calls = getattr(tick, "calls", 0) + 1


def make():
    n = 0

    def count():
        nonlocal n
        n += 1
        return n

    return count


count = make()


class Slotted:
    __slots__ = ("calls", "new")

    def __init__(self):
        self.calls = []


def remember(x, met=[], *, by={}):  # noqa: B006
    met.append(1)
    by["x"] = 1


class Changing(nn.Module):
    """Changes what each test names."""

    kinds = 0

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(2))
        self.held = {"by": {"name": [0]}}
        self.namespace = types.SimpleNamespace(calls=0)
        self.last = deque([1, 2], maxlen=2)
        self.generator = random.Random(0)
        self.slotted = Slotted()
        self.deep = {"a": {"b": {"c": {"d": {"e": [0]}}}}}
        self.pair = ([0], 1)
        self.drawing = np.random.default_rng(0)
        self.twister = np.random.Generator(np.random.MT19937(0))
        self.older = np.random.RandomState(0)
        self.counts = {"rows": np.zeros(2), "all": np.array(0.0)}
        self.bits = bytearray(2)
        self.codes = array("l", [0])
        self.waiting = queue.Queue()
        self.here = threading.local()
        self.here.calls = 0

    def forward(self, x):
        global N
        N += 1
        COUNTS["calls"] += 1
        COUNTS["of"]["each"][0] += 1
        TOTAL.add_(1)
        next(IDS)
        RECENT.move_to_end("a")
        Log.lines += 1
        type(self).kinds += 1
        type(self).new = 1
        tick()
        count()
        self.average.add_(1)
        self.calls = 1
        self.held["by"]["name"].append(1)
        self.namespace.calls += 1
        self.last.append(3)
        self.generator.random()
        self.slotted.calls.append(1)
        self.slotted.new = 1
        self.deep["a"]["b"]["c"]["d"]["e"].append(1)
        self.pair[0].append(1)
        remember(x)
        self.drawing.random()
        self.twister.random()
        self.older.random_sample()
        self.counts["rows"][0] += 1
        self.counts["all"] += 1
        self.bits[0] += 1
        self.codes[0] += 1
        self.waiting.put(1)
        self.here.calls += 1
        os.environ["NORMSWAP_TEST_SNAPSHOT"] = "1"
        return x + torch.rand(())


LOOKS = {
    "a global": lambda m: N,
    "a dict": lambda m: COUNTS["calls"],
    "a list in a dict in a dict": lambda m: COUNTS["of"]["each"][:],
    "a tensor": lambda m: TOTAL.tolist(),
    "an iterator": lambda m: repr(IDS),
    "the order of a dict": lambda m: list(RECENT),
    "a class": lambda m: Log.lines,
    "the class of the model": lambda m: (Changing.kinds, hasattr(Changing, "new")),
    "a function": lambda m: hasattr(tick, "calls"),
    "a variable around a function": lambda m: count.__closure__[0].cell_contents,
    "a buffer": lambda m: m.average.tolist(),
    "a new attribute": lambda m: hasattr(m, "calls"),
    "a list in an attribute": lambda m: m.held["by"]["name"][:],
    "a plain object": lambda m: m.namespace.calls,
    "a deque": lambda m: list(m.last),
    "a generator": lambda m: m.generator.getstate(),
    "slots": lambda m: (m.slotted.calls[:], hasattr(m.slotted, "new")),
    "nested deeply": lambda m: m.deep["a"]["b"]["c"]["d"]["e"][:],
    "a list in a tuple": lambda m: m.pair[0][:],
    "a default": lambda m: remember.__defaults__[0][:],
    "a keyword's default": lambda m: dict(remember.__kwdefaults__["by"]),
    "NumPy's generator": lambda m: str(m.drawing.bit_generator.state),
    "NumPy's twister": lambda m: str(m.twister.bit_generator.state),
    "an older generator of NumPy": lambda m: str(m.older.get_state()),
    "arrays": lambda m: (m.counts["rows"].tolist(), float(m.counts["all"]), m.bits[0], m.codes[0]),
    "a queue": lambda m: m.waiting.qsize(),
    "what belongs to a thread": lambda m: m.here.calls,
    "the environment": lambda m: os.environ.get("NORMSWAP_TEST_SNAPSHOT"),
    "torch's generator": lambda m: torch.get_rng_state().tolist(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_a_forward_changes_is_put_back_each_time(name):
    model, look = Changing(), LOOKS[name]
    snapshot, before = Snapshot(model), look(model)
    for _ in range(2):
        model(torch.zeros(2))
        assert look(model) != before
        assert snapshot.restore()
        assert look(model) == before


def test_only_generators_that_moved_are_said_to_have_moved():
    model = Changing()
    snapshot = Snapshot(model)
    model.average.add_(1)
    assert not snapshot.restore()
    with torch.random.fork_rng(devices=[]):
        snapshot.restore(seed=3)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3))


class Momentum(Holder):
    """Moves one block's weights towards the other's in each forward, as momentum encoders do."""

    def __init__(self, exchange):
        super().__init__()
        self.exchange = exchange

    def forward(self, x):
        for slow, fast in zip(self.b.parameters(), self.a.parameters(), strict=True):
            if self.exchange:
                slow.data = slow.data * 0.9 + fast.data * 0.1
            else:
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
        return self.b(self.a(x))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("trace", [True, False])
def test_weights_that_a_forward_moves_move_once_a_call(exchange, trace):
    model = Momentum(exchange).eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False, trace=trace)
    with torch.no_grad():
        for _ in range(2):
            close([converted(images(), context=LABELS)], [model(images())])
    assert torch.equal(converted.b.conv.weight, model.b.conv.weight)
