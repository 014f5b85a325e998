"""Models that order, fold or repeat the rows a norm sees, and how to check them."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError

K, N = 3, 4
LABELS = torch.tensor([2, 0, 1, 0])


class Folding(nn.Module):
    """Norms rows that `fold` makes of (N, T, C) tokens, and unfolds them again."""

    def __init__(self, fold, unfold):
        super().__init__()
        self.first = nn.BatchNorm1d(6)
        self.norm = nn.BatchNorm1d(6)
        self.fold = fold
        self.unfold = unfold

    def forward(self, x):
        y = self.norm(self.fold(self.first(x.transpose(1, 2)).transpose(1, 2)))
        return self.unfold(y, x.shape[0])


def outermost(x):
    return x.reshape(-1, x.shape[-1])


def from_outermost(y, n):
    return y.reshape(n, -1, y.shape[-1])


def innermost(x):
    return x.permute(1, 0, 2).reshape(-1, x.shape[-1])


def from_innermost(y, n):
    return y.reshape(-1, n, y.shape[-1]).permute(1, 0, 2)


def twice(x):
    return torch.cat([x.mean(1), x.amax(1)])


def from_twice(y, n):
    return y[:n] * y[n:].sin()


def apart(model):
    """Give every context its own statistics and affine."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNorm):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    tensor.add_(torch.rand_like(tensor))
    return model


def rows_of(model):
    return {row.fqn: row.rows for row in normswap.summary(model).rows}


def singly(model, x, labels=LABELS):
    return torch.cat([model(x[i : i + 1], context=labels[i : i + 1]) for i in range(len(x))])


def converted(fold, unfold):
    model = Folding(fold, unfold).double().eval()
    return apart(normswap.convert(model, "cn", contexts=K))


FOLDS = pytest.mark.parametrize(
    ("fold", "unfold"),
    [(outermost, from_outermost), (innermost, from_innermost), (twice, from_twice)],
)


class TwoViews(nn.Module):
    """Concatenates a second view of its input in training only."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.calls = 0
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        self.average = 0.9 * self.average + x.mean(0)
        return self.norm(torch.cat([x, x * 2]) if self.training else x)


class Rows(nn.Module):
    """Norms what `order` makes of the rows of a linear layer, `order(self, rows)`."""

    def __init__(self, order):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.flag = False
        self.order = order

    def forward(self, x):
        return self.order(self, self.linear(x))


def ordered(order):
    return apart(normswap.convert(Rows(order).double().eval(), "cn", contexts=K, verify=False))


def check(model, samples=(4, 3, 2, 6)):
    """Compare mixed batches with their samples one by one."""
    for count in samples:
        x = torch.randn(count, 6, dtype=torch.float64)
        labels = torch.randint(0, K, (count,))
        labels[0] = (labels[1] + 1) % K
        y = model(x, context=labels)
        assert torch.allclose(y, singly(model, x, labels), rtol=1e-10)


@contextmanager
def refusal(part):
    """Take a ContextError that says this; another error, or none, passes."""
    try:
        yield
    except ContextError as error:
        if part not in str(error):
            raise


def taken(s, x, index):
    """Norm rows in the order of an index, and put them back."""
    return s.norm(x[index])[index.argsort()]


def permutation(x):
    return torch.tensor([2, 0, 3, 1, 5, 4])[torch.tensor([2, 0, 3, 1, 5, 4]) < len(x)]


def pairs(s, x):
    one, two = s.norm(torch.cat([x, 2 * x])).chunk(2)
    return one * two


def stacked(s, x):
    one, two = s.norm(torch.stack([x, 2 * x], 1).flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    return one * two


def by_turns(s, x):
    halves = [torch.arange(len(x))[i::2] for i in (0, 1)]
    return taken(s, x, torch.cat(halves))


ORDERS = {
    "as they are": lambda s, x: s.norm(x),
    "flipped": lambda s, x: s.norm(x.flip(0)).flip(0),
    "permuted": lambda s, x: taken(s, x, permutation(x)),
    "pairs": pairs,
    "stacked": stacked,
    "even, then odd": by_turns,
    "pieces of two": lambda s, x: torch.cat([s.norm(part) for part in x.split(2)]),
    "one by one": lambda s, x: torch.cat([s.norm(row.unsqueeze(0)) for row in x]),
    "twice": lambda s, x: s.norm(s.norm(x).flip(0)).flip(0) + pairs(s, x),
    "with a constant row": lambda s, x: s.norm(torch.stack([x, x * 0 + 1], 1).flatten(0, 1))[::2],
    "views in one mode": lambda s, x: pairs(s, x) if s.training else s.norm(x),
    "other views by mode": lambda s, x: pairs(s, x) if s.training else stacked(s, x),
    "by gradients": lambda s, x: pairs(s, x) if torch.is_grad_enabled() else stacked(s, x),
    "by a flag": lambda s, x: pairs(s, x) if s.flag else stacked(s, x),
    "half of it by values": lambda s, x: torch.where(x.sum(1, True) > 0, s.norm(x), s.norm(-x)),
}


class Own(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, permute):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.generator = torch.Generator()
        self.permute = permute

    def forward(self, x):
        if self.permute:
            return self.norm(x[torch.randperm(len(x), generator=self.generator)])
        return self.norm(x * (torch.rand(x.shape, generator=self.generator) + 1))


def own(permute, seed):
    model = normswap.convert(Own(permute).eval(), "cn", contexts=K, verify=False, inplace=True)
    model.generator.manual_seed(seed)
    return model
