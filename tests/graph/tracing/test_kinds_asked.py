"""What a forward asks of a value in ways that no stand-in can answer: the forward is scoped."""

import abc

import pytest
import torch
from torch import nn

import normswap
from tests.support.behave import Holder, check, images


class Sized(metaclass=abc.ABCMeta):  # noqa: B024
    @classmethod
    def __subclasshook__(cls, kind):
        return hasattr(kind, "dim")


def is_float(model, y):
    return isinstance(y, torch.FloatTensor)


def is_parameter(model, y):
    return isinstance(model.gain, nn.Parameter)


def is_sized(model, y):
    return isinstance(y, Sized)


def has_no_keys(model, y):
    return not hasattr(y, "keys")


def has_a_length(model, y):
    return hasattr(y.shape[0], "__len__")


def keys_of(model, y):
    return getattr(y, "keys", 1)


def is_of_another_name(model, y):
    is_a = isinstance
    return is_a(y, torch.Tensor)


def has_by_a_function(model, y):
    return all(map(hasattr, [y], ["dim"]))


ASKS = {
    is_of_another_name: "hands on isinstance",
    has_by_a_function: "hands on hasattr",
    is_float: "FloatTensor",
    is_parameter: "asks for the type",
    is_sized: "asks for the type",
    has_no_keys: "looks up .keys",
    has_a_length: "looks up .__len__",
    keys_of: "looks up .keys",
}


class Asking(Holder):
    def __init__(self, question):
        super().__init__()
        self.gain, self.question = nn.Parameter(torch.ones(1)), question

    def forward(self, x):
        y = self.b(self.a(x))
        return y * 2 if self.question(self, y) else y


@pytest.mark.parametrize("question", ASKS)
def test_what_only_the_value_can_answer(question):
    check(Asking(question), opaque=ASKS[question])


class AskingInput(Holder):
    def forward(self, x):
        found = isinstance(x, Sized), isinstance(x, list | tuple)
        y = self.b(self.a(x))
        return y * 2 if found == (True, False) else y


def test_an_input_is_a_tensor():
    check(AskingInput())


class Joining(Holder):
    """Functions in C ask what they are given, too."""

    def forward(self, x):
        y = self.a(x)
        parts = torch.stack((y, y * 2))
        return self.b(torch.cat(parts.unbind(), 1)[:, ::2])


class JoinsParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, parts):
        return self.norm(torch.cat(parts, 1))


def test_functions_of_torch_take_values_in_place_of_lists():
    check(Joining())
    converted = normswap.convert(JoinsParts(), "cn", contexts=3, verify=False)
    assert not normswap.summary(converted).opaque


def scaled(x):
    return x


class Scaling(Holder):
    def forward(self, x):
        own = scaled
        return own(self.b(self.a(x))) * own.gain * getattr(scaled, "late", 1.0)


def test_attributes_of_functions_take_effect(monkeypatch):
    monkeypatch.setattr(scaled, "gain", 2.0, raising=False)
    converted = check(Scaling())
    x = images()
    before = converted(x, context="0")
    for name, factor in (("gain", 1.5), ("late", 4.5)):
        monkeypatch.setattr(scaled, name, 3.0, raising=False)
        torch.testing.assert_close(converted(x, context="0"), before * factor)


class Gains(Holder):
    def __init__(self):
        super().__init__()
        self.gains = nn.Linear(1, 1)

    def forward(self, x):
        y = self.b(self.a(x))
        for gain in self.gains.parameters():
            y = y * gain
        return y


def test_parameters_from_a_loop_are_read_anew():
    converted = check(Gains())
    x = images()
    before = converted(x, context="0")
    with torch.no_grad():
        converted.gains.weight.mul_(2)
    torch.testing.assert_close(converted(x, context="0"), before * 2)
