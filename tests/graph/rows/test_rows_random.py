"""Random programs of folds, orders and routes before norms: right, or an error that says so."""

import random

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError
from tests.support.rows import refusal
from tests.support.sampling import sampled

K, C = 3, 5


def fold(rows, tokens, x):
    return rows


def transpose(rows, tokens, x):
    return rows.view(-1, tokens).T.flatten()


def flip(rows, tokens, x):
    return rows.flip(0)


def flip_samples(rows, tokens, x):
    return rows.view(-1, tokens).flip(0).flatten()


def turn(rows, tokens, x):
    return rows.roll(1)


def interleave(rows, tokens, x):
    return torch.cat([rows[::2], rows[1::2]])


def shuffle_steadily(rows, tokens, x):
    # A shuffle that leaves five samples in order and moves others is a limit: see graph/rows.py.
    if tokens == 1:
        return rows
    return rows[torch.rand(len(rows), generator=torch.Generator().manual_seed(4)).argsort()]


STEADY = [fold, transpose, flip, flip_samples, turn, interleave, shuffle_steadily]


def shuffle(rows, tokens, x):
    return rows[torch.randperm(len(rows))]


def shuffle_in_python(rows, tokens, x):
    return rows[torch.tensor(random.sample(range(len(rows)), len(rows)))]


def sort(rows, tokens, x):
    return rows[x[rows].sum(1).argsort()]


def sort_samples(rows, tokens, x):
    return rows.view(-1, tokens)[x.view(-1, tokens * C).sum(1).argsort()].flatten()


def largest_first(rows, tokens, x):
    return rows.roll(-int(x[rows].sum(1).argmax()))


UNSTEADY = [shuffle, shuffle_in_python, sort, sort_samples, largest_first]


def whole(rows, x):
    return [rows]


def halves(rows, x):
    return list(rows.split(max(len(rows) // 2, 1)))


def threes(rows, x):
    return list(rows.split(3))


def one_by_one(rows, x):
    return list(rows.split(1))


def routed(rows, x):
    chosen = x[rows, 0] > 0
    return [part for part in (rows[chosen], rows[~chosen]) if len(part)]


PARTS = [whole, whole, whole, halves, threes, one_by_one, routed]


class Program(nn.Module):
    """Two norms, each given the tokens (N, T, C) in an order of its own, in parts."""

    def __init__(self, draw):
        super().__init__()
        self.linear = nn.Linear(C, C)
        self.norms = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(2))
        kinds = STEADY if draw.random() < 0.6 else STEADY + UNSTEADY
        self.orders = [draw.choices(kinds, k=draw.randint(1, 3)) for _ in range(2)]
        self.parts = [draw.choice(PARTS) for _ in range(2)]
        # Two views, the second in a place of its own, in some programs in one mode only.
        self.views = [draw.choice(["", "cat", "stack", "training"]) for _ in range(2)]

    def forward(self, x):
        tokens = x.shape[1]
        h = self.linear(x).flatten(0, 1)
        for norm, orders, parts, views in zip(
            self.norms, self.orders, self.parts, self.views, strict=True
        ):
            if views == "cat" or (views == "training" and self.training):
                h, count = torch.cat([h, h.sin()]), tokens
            elif views == "stack":
                h, count = torch.stack([h, h.sin()], 1).flatten(0, 1), 2 * tokens
            else:
                count = tokens
            rows = torch.arange(len(h))
            for order in orders:
                rows = order(rows, count, h)
            y = torch.zeros_like(h)
            for part in parts(rows, h):
                y[part] = norm(h[part])
            if len(h) > x.shape[0] * tokens:
                if views == "stack":
                    y = y.unflatten(0, (-1, 2)).prod(1)
                else:
                    y = y.unflatten(0, (2, -1)).prod(0)
            h = y
        return h.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("seed", sampled(range(80), 15))
def test_a_mixed_batch_equals_its_samples_one_by_one_or_is_refused(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    original = Program(draw).double().eval()
    model = normswap.convert(original, "cn", contexts=K, verify=False)
    with torch.no_grad():
        for norm in model.norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.add_(torch.rand_like(tensor))
    for _ in range(4):
        count, tokens = draw.randint(2, 6), draw.randint(1, 3)
        x = torch.randn(count, tokens, C, dtype=torch.float64)
        labels = torch.tensor([draw.randrange(K) for _ in range(count)])
        y = None
        with refusal("exclude='norms."):
            y = model.train(draw.random() < 0.3)(x, context=labels)
        if y is not None and not model.training:
            parts = [model(x[i : i + 1], context=labels[i : i + 1]) for i in range(count)]
            assert torch.allclose(y, torch.cat(parts), rtol=1e-9)


def test_programs_whose_order_is_steady_are_right_in_most_cases():
    """The test above would pass if all were refused."""
    refused = 0
    for seed in range(20):
        draw = random.Random(seed)
        model = Program(draw).double().eval()
        model.orders = [draw.choices(STEADY, k=2) for _ in range(2)]
        model.parts = [draw.choice(PARTS[:-1]) for _ in range(2)]
        model = normswap.convert(model, "cn", contexts=K, verify=False)
        try:
            model(torch.randn(4, 2, C, dtype=torch.float64), context=torch.tensor([0, 1, 2, 0]))
        except ContextError:
            refused += 1
    assert refused == 0
