"""What functions hold is looked for once, and not in what a conversion keeps."""

from collections import Counter

import timm
import torch
from torch import nn

import normswap
from normswap.graph import not_copied

NORM = nn.BatchNorm1d(2)


def first():
    return second, NORM


def second():
    return first


def test_a_function_that_two_lead_to_is_looked_at_once(monkeypatch):
    looked, parts_of = [], not_copied._parts_of
    monkeypatch.setattr(not_copied, "_parts_of", lambda f: looked.append(f) or parts_of(f))
    met = set()
    assert list(not_copied.find_pinned(first, met)) == [NORM]
    assert list(not_copied.find_pinned([second, first], met)) == []
    assert looked == [first, second]


def test_reverting_looks_at_each_function_that_forwards_lead_to_once_a_pass(monkeypatch):
    # A forward names globals of its package, and by way of these all the package's models.
    model = normswap.convert(timm.create_model("resnet10t"), "cn", contexts=2, verify=False)
    model.eval()(torch.ones(2, 3, 32, 32), context=torch.tensor([0, 1]))
    looked, parts_of = [], not_copied._parts_of
    monkeypatch.setattr(not_copied, "_parts_of", lambda f: looked.append(f) or parts_of(f))
    normswap.revert(model)
    assert set(Counter(looked).values()) == {2}  # once for the copy, once for what holds a layer
    assert not any(f.__module__.startswith("torch.nn.") for f in looked)
