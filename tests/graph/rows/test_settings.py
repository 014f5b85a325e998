"""An order that follows a setting of the model is measured anew where the setting changes."""

import enum
import functools
import pickle
import types
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap.graph.rows.run import Run
from tests.support.rows import LABELS, K, N, apart, singly


class Order(enum.Enum):
    AS_IS = 0
    FLIPPED = 1


@dataclass
class Config:
    flip: bool


class Options:
    """Holds a setting as an object of any class does."""

    def __init__(self, flip):
        self.flip = flip


def always(x):
    return True


def never(x):
    return False


# How an argument holds a setting, beside the ways of an attribute.
ARGUMENTS = {
    "object": (Options, lambda given: given.flip),
    "object in a namespace": (
        lambda flip: types.SimpleNamespace(rows=Options(flip)),
        lambda given: given.rows.flip,
    ),
    "set": (lambda flip: {"flip"} if flip else {"keep"}, lambda given: "flip" in given),
    "function": (lambda flip: always if flip else never, lambda given: given(0)),
    "partial": (lambda flip: functools.partial(always if flip else never), lambda given: given(0)),
    "range": (lambda flip: range(3 if flip else 4), lambda given: len(given) == 3),
    "bytes": (lambda flip: b"flip" if flip else b"keep", lambda given: given == b"flip"),
    "class": (lambda flip: bool if flip else int, lambda given: given is bool),
    "array": (lambda flip: np.bool_(flip), bool),
}

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
    "tensor": (torch.tensor, bool),
    "number in a tensor": (lambda flip: torch.tensor(int(flip)), lambda kept: kept.item() == 1),
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


@pytest.mark.parametrize(
    ("keep", "read"), (SETTINGS | ARGUMENTS).values(), ids=SETTINGS | ARGUMENTS
)
def test_an_argument_that_changes_the_order_of_samples(keep, read):
    class Told(Flipping):
        def forward(self, x, kept):
            self.kept = kept
            return super().forward(x)

    model = Told(keep(False), read).double().eval()
    model = apart(normswap.convert(model, "cn", contexts=K, verify=False))
    for flip in (False, True, False):
        x = torch.randn(N, 6, dtype=torch.float64)
        y = model(x, keep(flip), context=LABELS)
        one = [model(x[i : i + 1], keep(flip), context=LABELS[i : i + 1]) for i in range(N)]
        torch.testing.assert_close(y, torch.cat(one))
    pickle.dumps(model.norm.scope)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_a_buffer_that_changes_the_order_of_samples(dtype):
    model = Flipping(None, bool)
    del model.kept
    model.register_buffer("kept", torch.zeros(1, dtype=dtype))
    model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
    for flip in (0, 1, 0):
        model.kept.fill_(flip)
        x = torch.randn(N, 6, dtype=torch.float64)
        torch.testing.assert_close(model(x, context=LABELS), singly(model, x))


def test_a_counter_in_a_buffer_is_soon_no_reason_to_measure():
    class Counting(Flipping):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting(False, bool)
    model.register_buffer("calls", torch.tensor(0))
    model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
    x = torch.randn(N, 6, dtype=torch.float64)
    with mock.patch.object(Run, "measure", autospec=True, side_effect=Run.measure) as measured:
        counts = [(model(x, context=LABELS), measured.call_count)[1] for _ in range(6)]
    assert counts[0] > 0
    assert counts[2] == counts[-1]


def test_settings_that_hold_themselves_or_much_are_no_trouble():
    model = Flipping(types.SimpleNamespace(flip=False, seen={}), lambda kept: kept.flip)
    model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
    model.kept.itself = model.kept
    model.kept.seen.update((n, n % 2 == 0) for n in range(100_000))
    x = torch.randn(N, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x, context=LABELS), singly(model, x))
