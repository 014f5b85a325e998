from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.sweep.build import build_filled, trim_repeats
from tests.sweep.outputs import Incomparable, apart, joined, leaves
from tests.sweep.report import share


@dataclass
class Pair:
    first: object
    second: object


def test_every_tensor_of_a_nested_output_is_found():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    found = leaves({"a": [one, (two, None)], "b": Pair(three, "text"), "c": 2.5})
    assert [t.numel() for t in found] == [1, 2, 3, 1]
    assert float(found[-1]) == 2.5
    with pytest.raises(Incomparable, match="outputs a object"):
        leaves([object()])


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1e-3, 0.0], [0.0, 0.0], float("inf")),
    ],
)
def test_differences_are_relative_to_the_largest_value(new, old, expected):
    assert apart([torch.tensor(new)], [torch.tensor(old)]) == expected


def test_integers_must_be_the_same_and_shapes_too():
    assert apart([torch.tensor([1])], [torch.tensor([2])]) == float("inf")
    with pytest.raises(Incomparable, match="shapes"):
        apart([torch.ones(2)], [torch.ones(3)])


def test_samples_are_joined_as_their_batch_has_them():
    whole = [torch.arange(6.0).view(3, 2), torch.tensor(7.0)]
    singles = [[whole[0][i : i + 1], whole[1]] for i in range(3)]
    assert all(map(torch.equal, joined(singles, whole), whole))
    boxes = [torch.ones(i + 1, 4) for i in range(3)]
    assert all(map(torch.equal, joined([[b] for b in boxes], boxes), boxes))
    layers = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(joined([[layers[:, i : i + 1]] for i in range(3)], [layers])[0], layers)
    with pytest.raises(Incomparable, match="a batch outputs"):
        joined(singles, [torch.ones(5, 2), torch.ones(2)])


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        same = [nn.Sequential(nn.Linear(80, 80), nn.ReLU()) for _ in range(5)]
        self.body = nn.Sequential(nn.Linear(3, 80), *same, nn.Linear(80, 2))

    def forward(self, x):
        return self.body(x)


def test_trimming_keeps_some_of_the_repeated_blocks():
    model = Blocks()
    assert trim_repeats(model, 2) == 3
    assert [len(list(m.parameters())) for m in model.body] == [2, 2, 2, 2]
    assert model(torch.ones(4, 3)).shape == (4, 2)


def test_filled_models_have_no_constant_and_no_unset_parameter():
    def build():
        model = Blocks()
        nn.init.zeros_(model.body[0].weight)
        model.scale = nn.Parameter(torch.full((10,), 1e-6))
        model.norm = nn.BatchNorm1d(9000)
        return model

    first, again = (build_filled(build, "name", 0, torch.float64, 0) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
        assert one.std() > 1e-3
    assert first.norm.running_var.std() > 0.1


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(5, 5, "5 of 5 (100.00 %)"), (99999, 100000, "99,999 of 100,000 (99.99 %)"), (0, 0, "0")],
)
def test_a_share_says_100_percent_only_of_all(part, whole, text):
    assert share(part, whole) == text
