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


SHAPED = [
    lambda index: torch.stack([index, index]),  # ends of edges from each node to itself
    lambda index: torch.stack([index, index], 1),
    lambda index: torch.stack([index, torch.zeros_like(index)]),  # nodes of two kinds
    lambda index: index.view(1, -1),
    lambda index: index.view(-1, 1),
    lambda index: index.view(1, 1, -1),
]


@pytest.mark.parametrize(
    ("shaped", "in_turn"),
    # What has N entries along dimension 0 looks like samples.
    [(f, i) for f in SHAPED for i in (torch.arange(N), IN_TURN) if len(f(i)) != N],
)
def test_an_index_of_rows_in_turn_may_be_another_in_a_later_call(shaped, in_turn):
    class Pair(Taking):
        def forward(self, x, edges):
            longest = edges.shape.index(max(edges.shape))
            ends = edges.movedim(longest, -1).reshape(-1, edges.shape[longest])
            limit = torch.ones(1 + int(ends[1:].max())) if len(ends) == 2 else torch.ones(N)
            one = limit[ends[-1]].unsqueeze(1)  # raises where an end is of the other kind
            return self.norm(x[ends[0]] * one)

    model = apart(normswap.convert(Pair().double().eval(), "cn", contexts=K, verify=False))
    for index in (in_turn, in_turn.flip(0), in_turn.roll(3), in_turn):
        x = torch.randn(N, 6, dtype=torch.float64)
        y = model(x, shaped(index), context=LABELS)
        torch.testing.assert_close(y, model.norm(x[index], context=LABELS[index]))


class Mixing(Taking):
    def forward(self, x, beside):
        return self.norm(beside @ x)


LAYOUTS = [
    lambda matrix: matrix.to_sparse(),
    lambda matrix: matrix.to_sparse_csr(),
    lambda matrix: matrix.to_sparse_csc(),
    lambda matrix: matrix.to_sparse_bsr((1, 1)),
]


def choosing(index):
    return torch.eye(N, dtype=torch.float64)[index]


@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")
@pytest.mark.parametrize("sparse", LAYOUTS)
@pytest.mark.parametrize("in_turn", [torch.arange(N), IN_TURN])
def test_a_sparse_matrix_may_tell_the_samples_of_rows(sparse, in_turn):
    model = apart(normswap.convert(Mixing().double().eval(), "cn", contexts=K, verify=False))
    for index in (in_turn, in_turn.flip(0), in_turn.roll(3), in_turn):
        x = torch.randn(N, 6, dtype=torch.float64)
        y = model(x, sparse(choosing(index)), context=LABELS)
        torch.testing.assert_close(y, model.norm(x[index], context=LABELS[index]))


@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")
@pytest.mark.parametrize("sparse", LAYOUTS)
def test_neighbours_of_a_sparse_matrix_are_mixed_samples(sparse):
    model = apart(normswap.convert(Mixing().double().eval(), "cn", contexts=K, verify=False))
    x, matrix = torch.randn(N, 6, dtype=torch.float64), choosing(torch.arange(N).roll(1))
    with pytest.raises(normswap.ContextError, match=r"made of several samples.*one context"):
        model(x, sparse(matrix + torch.eye(N)), context=LABELS)
    y = model(x, sparse(matrix + torch.eye(N)), context="1")
    torch.testing.assert_close(y, model.norm(x + x.roll(1, 0), context="1"))


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
