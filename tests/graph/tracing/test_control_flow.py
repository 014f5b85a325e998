"""What a forward decides while it runs is never decided once and for all by a trace."""

import random
import sys

import pytest
import torch
from torch import nn

import normswap
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


def test_none_from_a_function():
    class Model(Holder):
        def forward(self, x):
            mask = mean_or_none(x, False)
            return self.a(x) if mask is None else self.a(x) * 3

    check(Model(), opaque="asks whether mask is None, known only when it runs")


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


def test_sums_that_start_with_none_are_traced():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([nn.Sequential(nn.ReLU(), Block()) for _ in range(2)])

        def forward(self, x):
            total = None
            for branch in self.branches:
                total = branch(x) if total is None else total + branch(x)
            return total

    check(Model())


def test_attributes_compared_with_none_are_traced():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.extra = None

        def forward(self, x):
            y = self.a(x)
            return self.b(y) if self.extra is None else self.extra(y)

    check(Model())


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
        (OfModule, "calls random.random(), a method of a Random"),
        (OfObject, "calls a method of .source, a Random"),
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


def test_a_custom_function_is_called():
    class Model(Holder):
        def forward(self, x):
            return Square.apply(self.b(self.a(x)))

    check(Model())


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

    check(Model())


def test_a_slice_of_a_result_is_certainly_not_none():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x)
            part = (y + 1)[:, : CHANNELS // 2, :]
            return self.b(y) if part is None else self.b(torch.cat([part, part], 1))

    check(Model())


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


def test_a_size_made_a_tensor():
    class Model(Holder):
        def forward(self, x):
            y = self.a(x) / torch.sqrt(torch.tensor(x.shape[1], dtype=x.dtype))
            return self.b(y) + torch.as_tensor([x.shape[2], 1.0]).sum()

    check(Model())


def test_a_module_that_torch_loads_late(monkeypatch):
    class Model(Holder):
        def forward(self, x):
            return self.b(self.a(x)) if torch.onnx.is_in_onnx_export() else self.a(self.b(x))

    torch.onnx.is_in_onnx_export()
    package = sys.modules["torch.onnx._internal.exporter"]
    monkeypatch.delitem(sys.modules, f"{package.__name__}._flags")
    monkeypatch.delattr(package, "_flags")
    converted = normswap.convert(Model(), "cn", contexts=3, verify=False)
    assert not normswap.summary(converted).opaque
