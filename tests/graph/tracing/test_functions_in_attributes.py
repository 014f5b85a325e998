"""What a module, class or function holds is judged as what a name means, and compared with it."""

import math
import random

import pytest
import torch

import normswap
from tests.support.behave import LABELS, Holder, check, close, images

HEARD, SETTINGS = [], {"scale": 1.0}


def heard(x, hear=HEARD.append):
    hear(x)
    return x


def shaken(x, *, by=random.random):
    return x * (1 + 0.0 * by())


def scaled(x):
    return x * scaled.get("scale")


scaled.get = SETTINGS.get


class Held(Holder):
    of_class = HEARD.append

    def __init__(self):
        super().__init__()
        self.hear, self.get, self.act = HEARD.append, SETTINGS.get, torch.relu

    def forward(self, x):
        return self.run(self.b(self.a(x)))


def held(run):
    return type("Held", (Held,), {"run": run})()


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: (self.hear(x), x)[1],
        lambda self, x: (self.of_class(x), x)[1],
        lambda self, x: heard(x),
    ],
    ids=["of an attribute", "of a class", "of a default"],
)
def test_what_changes_a_list_runs_each_time(run):
    HEARD.clear()
    converted = normswap.convert(held(run), "cn", contexts=3)
    assert HEARD == []
    found = [converted(images(), context=label) for label in (0, 1, 0)]
    assert len(HEARD) == 3
    assert all(isinstance(x, torch.Tensor) for x in HEARD)
    close(HEARD, found)


@pytest.mark.parametrize(
    "run",
    [lambda self, x: x * self.get("scale"), lambda self, x: scaled(x)],
    ids=["of an attribute", "of a function"],
)
def test_what_reads_a_dict_reads_it_each_time(run, monkeypatch):
    model = held(run).eval()
    converted = normswap.convert(model, "cn", contexts=3)
    for scale in (1.0, 3.0):
        monkeypatch.setitem(SETTINGS, "scale", scale)
        close(converted(images(), context=LABELS), model(images()))


def test_what_draws_numbers_draws_them_each_time():
    check(held(lambda self, x: shaken(x)), opaque="whose defaults or attributes may change")


def test_a_function_of_torch_has_a_graph():
    check(held(lambda self, x: self.act(x)))


class Signed(Holder):
    sign = 0.0

    def forward(self, x):
        return self.b(self.a(x)) * math.copysign(1.0, self.sign)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sign_of_zero_counts(compiled):
    model = Signed().eval()
    converted = normswap.convert(model, "cn", contexts=3)
    run = torch.compile(converted, backend="eager", fullgraph=True) if compiled else converted
    # torch's compiler takes one zero for the other.
    for sign in (0.0, 0.5, 0.0, -0.5) if compiled else (0.0, -0.0, 0.5, 0.0, -0.5):
        model.sign = converted.sign = sign
        close(run(images(), context=0), model(images()))
