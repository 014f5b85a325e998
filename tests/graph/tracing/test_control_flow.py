"""Control flow, writes and calls that a forward may hold."""

import random

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import Block, Holder, check, images


def test_an_exception_the_forward_handles():
    class Picky(Block):
        def forward(self, x):
            if x.shape[2] == 6:
                raise ValueError
            return super().forward(x)

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.picky = Picky()

        def forward(self, x):
            try:
                return self.picky(x)
            except ValueError:
                return self.b(self.a(x))

    check(Model(), opaque="handles exceptions")


def test_loops_over_modules_and_lists():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.named = nn.ModuleDict({"a": Block(), "b": Block()})

        def forward(self, x):
            features = [x]
            for block in self.blocks:
                features.append(block(features[-1]))
            out = features.pop()
            for feature, block in zip(features[::-1], reversed(self.blocks), strict=True):
                out = block(out + feature)
            for name, block in self.named.items():
                out = block(out) * (2 if name == "a" else 1)
            return out + torch.stack([block(x) for block in self.blocks]).sum(0)

    check(Model())


def test_recurrence_and_one_norm_under_two_names():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.again = self.a.norm

        def forward(self, x):
            state = torch.zeros_like(x)
            for _ in range(3):
                state = torch.tanh(self.a(state) + self.again(x))
            return state

    check(Model())


def test_writing_into_tensors():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x).clone()
            y[:, 0] = 0
            y[:, 1] += x[:, 1]
            y += x
            z = torch.empty_like(y)
            z[...] = y.mul_(2)
            z[:, :2], z[:, 2:] = y[:, 2:], y[:, :2]
            return self.b(z)

    check(Model())


def test_setting_an_attribute_of_a_tensor():
    class Model(Holder):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().clone()
                x.requires_grad = True
                (gradient,) = torch.autograd.grad(self.b(self.a(x)).sum(), x)
            return gradient

    check(Model(), opaque="inside forward")


class OfModule(Holder):
    def forward(self, x):
        return self.b(self.a(x)) if random.random() < 2 else x


class OfObject(Holder):
    def __init__(self):
        super().__init__()
        self.source = random.Random(0)

    def forward(self, x):
        return self.b(self.a(x)) if self.source.random() < 2 else x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OfModule, "reads random.random, a builtin_function_or_method outside of it"),
        (OfObject, "reads .source, a Random"),
    ],
)
def test_random_depth(model, reason):
    check(model(), opaque=reason)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 7


@pytest.mark.parametrize("held", [False, True])
def test_a_custom_function_keeps_its_gradient(held):
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.held, self.square = held, Square.apply

        def forward(self, x):
            y = self.b(self.a(x))
            return self.square(y) if self.held else Square.apply(y)

    reason = f"calls {'.square' if held else 'Square.apply'}(), of a function of autograd"
    converted = check(Model(), opaque=reason)
    gradients = []
    for last in (Square.apply, lambda y: 7 * y):
        x = images().requires_grad_()
        y = converted(x) if last is Square.apply else last(converted.b(converted.a(x)))
        y.sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_functions_that_a_module_holds_from_another_file():
    elsewhere = {"__name__": "elsewhere"}
    exec("def first(y): return y[0] if isinstance(y, tuple) else y", elsewhere)

    class Two(Block):
        def forward(self, x):
            return super().forward(x), x

    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.first = elsewhere["first"]
            self.two = Two()

        def forward(self, x):
            return self.b(self.first(self.two(x)))

    check(Model(), opaque="asks for the type of a value")


def test_an_indexed_result_returned():
    class Model(Holder):
        def forward(self, x):
            return (self.b(self.a(x)) * 2)[:, :2, :]

    check(Model())


def _is_installed():
    try:
        return bool(int("no number"))
    except ValueError:
        return False


def test_a_function_of_nothing_may_handle_exceptions():
    class Model(Holder):
        def forward(self, x):
            return self.a(x) if _is_installed() else self.b(self.a(x))

    check(Model())


def test_all_any_and_tuple_of_a_generator():
    # Python 3.14 first asks whether these are its own functions: no question of the forward's.
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.scales = (1.0, 2.0)

        def forward(self, x):
            y = self.a(x) if all(k > 0 for k in self.scales) else x
            y = -y if any(k > 1 for k in self.scales) else y
            return self.b(y), tuple(y * k for k in self.scales)

    check(Model())


def test_a_size_made_a_tensor():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x) / torch.sqrt(torch.tensor(x.shape[1], dtype=x.dtype))
            return self.b(y) + torch.as_tensor([x.shape[2], 1.0]).sum()

    check(Model(), opaque="asks for the length of a value known only when it runs")


def test_a_forward_refused_before_its_trace_begins_leaves_the_others_theirs():
    class Keeps(Holder):
        def forward(self, x, seen=[]):  # noqa: B006
            return self.b(self.a(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Keeps(), Holder()

        def forward(self, x):
            return self.second.b(self.first(x))

    converted = check(Model())
    assert set(normswap.summary(converted).opaque) == {"first"}


class Pairs(nn.Module):
    """Returns two values in something, of which an index need not be an item."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x, 2 * x)


class Backwards(list):
    def __iter__(self):
        return iter(self[::-1])


PAIRS = {
    "tuple": lambda a, b: (a, b),
    "keys": lambda a, b: {1: a, 0: b},
    "values": lambda a, b: {1: a, 0: b}.values(),
    "iterator": lambda a, b: iter([a, b]),
    "stacked": lambda a, b: torch.stack([a, b]),
    "own iteration": lambda a, b: Backwards([a, b]),
}


@pytest.mark.parametrize("wrap", PAIRS.values(), ids=PAIRS)
def test_unpacking_what_a_child_returns(wrap):
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.pairs = Pairs(wrap)

        def forward(self, x):
            y = self.a(x)
            first, second = self.pairs(y)
            return self.b(y * first + second)

    check(Model())
