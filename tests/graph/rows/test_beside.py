"""Rows whose order follows an argument that has no entry for each sample, or is an object."""

import types

import pytest
import torch
from torch import nn

import normswap
from tests.support.rows import LABELS, K, N, apart

IN_TURN = torch.arange(N).repeat_interleave(2)


class Taking(nn.Module):
    """Norms the rows of x that an index names, or x shifted by a number."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, beside):
        if isinstance(beside, dict):
            beside = beside["of"]
        return self.norm(x[beside] if beside.dim() else x.roll(int(beside), 0))


def taking():
    return apart(normswap.convert(Taking().double().eval(), "cn", contexts=K, verify=False))


@pytest.mark.parametrize("given", [lambda index: index, lambda index: {"of": index}])
def test_an_index_of_another_size_tells_the_samples_of_rows(given):
    model = taking()
    for index in (IN_TURN, torch.tensor([0, 1, 1, 1, 2, 2, 3, 3]), IN_TURN.flip(0), IN_TURN):
        x = torch.randn(N, 6, dtype=torch.float64)
        y = model(x, given(index), context=LABELS)
        torch.testing.assert_close(y, model(x[index], torch.tensor(0), context=LABELS[index]))


def test_a_single_number_may_tell_the_order():
    model = taking()
    for shift in (0, 1, 3, 0):
        x = torch.randn(N, 6, dtype=torch.float64)
        y = model(x, torch.tensor(shift), context=LABELS)
        parts = [model(x[i : i + 1], torch.tensor(0), context=LABELS[i : i + 1]) for i in range(N)]
        torch.testing.assert_close(y, torch.cat(parts).roll(shift, 0))


def test_an_index_that_is_the_same_in_all_calls_is_not_measured_twice(never_again):
    class Masked(Taking):
        def forward(self, x, steps):
            return self.norm(x[:, steps].flatten(0, 1))

    model = apart(normswap.convert(Masked().double().eval(), "cn", contexts=K, verify=False))
    steps = torch.tensor([0, 2, 1, 3, 4])
    model(torch.randn(N, 5, 6, dtype=torch.float64), steps, context=LABELS)
    never_again()
    model(torch.randn(N, 5, 6, dtype=torch.float64), steps, context=LABELS)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Nested:
    """Holds a batch in a dict of an object that knows its owner."""

    def __init__(self, x):
        self.store = types.SimpleNamespace(of=self, tensors={"x": x})

    @property
    def x(self):
        return self.store.tensors["x"]


@pytest.mark.parametrize("holder", [lambda x: types.SimpleNamespace(x=x), Slotted, Nested])
def test_samples_in_an_object_are_told_apart(holder):
    class Flipping(Taking):
        def forward(self, batch):
            return self.norm(batch.x.flip(0))

    model = apart(normswap.convert(Flipping().double().eval(), "cn", contexts=K, verify=False))
    x = torch.randn(N, 6, dtype=torch.float64)
    kept = x.clone()
    y = model(holder(x), context=LABELS)
    parts = [model(holder(x[i : i + 1]), context=LABELS[i : i + 1]) for i in range(N)]
    torch.testing.assert_close(y, torch.cat(parts).flip(0))
    assert torch.equal(x, kept)
