"""Collections of a class of the user's, whose own methods refuse, are no obstacle."""

from collections import deque

import pytest
import torch
from torch import nn

import normswap
from normswap.util.elements import COLLECTIONS, elements_of
from tests.support.builders import trained_norm


def refuses(self, *given):
    raise NotImplementedError


def refusing(base, *values):
    """Return a collection that refuses what a program may ask of it, as irreps of e3nn do."""
    asked = ("__len__", "__iter__", "__contains__", "__bool__", "count", "index", "values", "keys")
    copied = {"__deepcopy__": lambda self, memo: self}
    made = base.__new__(type("Refusing", (base,), dict.fromkeys(asked, refuses) | copied), *values)
    if base not in (tuple, frozenset):
        base.__init__(made, *values)
    return made


@pytest.mark.parametrize("base", [cls for cls in COLLECTIONS if cls is not dict])
def test_elements_are_found_without_asking(base):
    assert sorted(elements_of(refusing(base, [1, 2]))) == [1, 2]


def test_values_of_a_dict_are_found_without_asking():
    assert [*elements_of(refusing(dict, {"a": 1, "b": 2}))] == [1, 2]
    assert not [*elements_of("ab"), *elements_of(3), *elements_of(deque())]


class Holding(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.norm = trained_norm()
        self.held = held

    def forward(self, x):
        return self.norm(x) if self.held is not None else x


@pytest.mark.parametrize("method", ["cn", "selfnorm"])
@pytest.mark.parametrize("base", COLLECTIONS)
def test_a_model_that_holds_one_converts_runs_and_goes_back(base, method):
    model = Holding(refusing(base, {1: 2} if base is dict else [1, 2])).eval()
    x = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    labels = {"context": torch.tensor([0, 1, 1, 0])} if method == "cn" else {}
    given = {"contexts": 2} if labels else {}
    converted = normswap.convert(nn.Sequential(model), method, **given)
    torch.testing.assert_close(converted(x, **labels), expected)
    converted.train()(x, **labels)
    back = normswap.revert(converted, discard=True)[0]
    assert [*elements_of(back.held)] == [*elements_of(model.held)]


def test_a_model_with_a_list_that_holds_itself_converts():
    held = [1]
    held.append(held)
    converted = normswap.convert(Holding(held).eval(), "cn", contexts=2)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(converted(x, context=[0, 1]), Holding(held).eval()(x))
