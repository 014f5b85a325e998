"""Labels that cannot follow their samples are an error."""

import random

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError
from tests.support.rows import LABELS, K, N, ordered, own, refusal, singly, taken


def by_value(s, x):
    return taken(s, x, x.sum(1).argsort())


def at_random(s, x):
    return taken(s, x, torch.randperm(len(x)))


def at_random_in_python(s, x):
    return taken(s, x, torch.tensor(random.sample(range(len(x)), len(x))))


def random_pairs(s, x):
    index = torch.randperm(len(x))
    one, two = s.norm(torch.cat([x, x[index]])).chunk(2)
    return one * two[index.argsort()]


def experts(s, x):
    chosen = x.sum(1) > 0
    y = torch.zeros_like(x)
    for rows_of_one in (chosen, ~chosen):
        if rows_of_one.any():
            y[rows_of_one] = s.norm(x[rows_of_one])
    return y


def mixed(s, x):
    return s.norm(0.7 * x + 0.3 * x.flip(0))


def queue(s, x):
    held = torch.arange(6.0 * len(x), dtype=x.dtype).view(-1, 6)
    return s.norm(torch.cat([x, held]))[: len(x)]


@pytest.mark.parametrize(
    ("order", "cause"),
    [
        (at_random, "changes from call to call"),
        (at_random_in_python, "changes from call to call"),
        (random_pairs, "changes from call to call"),
        (by_value, "of several samples"),
        (mixed, "of several samples"),
        (queue, "from no sample"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_labels_that_cannot_follow_are_an_error_that_names_norm_cause_and_way_out(
    order, cause, seed
):
    model = ordered(order)
    torch.manual_seed(seed)
    random.seed(seed)
    x = torch.randn(4, 6, dtype=torch.float64)
    ways_out = "exclude='norm', or give each call samples of one context"
    with pytest.raises(ContextError, match=rf"input of norm .*{cause}.*{ways_out}"):
        model(x, context=LABELS)
    assert torch.isfinite(model(x, context=torch.ones(4, dtype=torch.int64))).all()
    assert torch.isfinite(model(x, context="1")).all()


@pytest.mark.parametrize(("step", "told"), [(1e-15, True), (1e-6, False)])
def test_rows_of_dead_activations_are_equal_but_for_rounding(step, told):
    def dead(s, x):
        x = (-x.abs()).flip(0).flip(0)  # past which no operator tells the rows
        return s.norm(x.relu() + 1 + step * torch.arange(len(x)).unsqueeze(1))

    model, x = ordered(dead), torch.randn(4, 6, dtype=torch.float64)
    if not told:
        with pytest.raises(ContextError, match="4 rows from no sample of 4"):
            model(x, context=LABELS)
        return
    y = model.norm(torch.ones_like(x), context=LABELS)
    torch.testing.assert_close(model(x, context=LABELS), y)


@pytest.mark.parametrize("seed", range(8))
def test_experts_that_values_choose_are_right_or_an_error(seed):
    model = ordered(experts)
    torch.manual_seed(seed)
    for count in (4, 5, 3):
        x = torch.randn(count, 6, dtype=torch.float64)
        labels = torch.arange(count) % K
        y = None
        with refusal("exclude='norm'"):
            y = model(x, context=labels)
        assert y is None or torch.allclose(y, singly(model, x, labels))


@pytest.mark.parametrize("draws", [False, True])
def test_two_samples_sorted_by_value_are_refused_in_every_call(draws):
    """Also where the forward draws random numbers, which have no say in the order."""
    model = ordered(lambda m, x: by_value(m, x) * torch.rand(()) if draws else by_value(m, x))
    x = torch.randn(2, 6, dtype=torch.float64)
    for batch in (x, x.flip(0), x, -x):
        with pytest.raises(ContextError, match=r"order depends on their values.*exclude='norm'"):
            model(batch, context=torch.tensor([0, 1]))


def test_a_random_pair_that_first_keeps_its_place_is_no_regular_order():
    # Of the first batch's permutations a sixth or more begin with 0.
    for seed in range(24):
        torch.manual_seed(seed)
        model = ordered(random_pairs)
        with pytest.raises(ContextError, match="changes from call to call"):
            model(torch.randn(3, 6, dtype=torch.float64), context=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("seed", range(8))
def test_an_order_drawn_from_a_generator_of_the_model_is_an_error(seed):
    with pytest.raises(ContextError, match="changes from call to call"):
        own(True, seed)(torch.randn(N, 6), context=LABELS)


@pytest.mark.parametrize("trace", [True, False])
def test_an_error_that_the_forward_catches_is_raised_all_the_same(trace):
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            try:
                return self.norm(x + x.roll(1, 0))
            except ValueError:
                return x

    model = normswap.convert(Catches(), "cn", contexts=2, verify=False, trace=trace).eval()
    x = torch.randn(4, 4, 3, 3)
    with pytest.raises(ContextError, match="exclude='norm'"):
        model(x, context=[0, 1, 0, 1])
    model(x, context=[1, 1, 1, 1])


class Sampler(nn.Module):
    """Repeats its samples in a method that is no forward, as a flow that draws several of each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.net(x)

    def draw(self, x, times):
        return self.net(x.repeat_interleave(times, 0))


def test_a_method_that_repeats_samples_is_told_to_get_a_label_for_each_row():
    model = normswap.convert(Sampler().eval(), "cn", contexts=2, verify=False)
    with torch.no_grad():
        model.net[1].running_mean[1] += 1.0
    x, labels = torch.randn(2, 3), torch.tensor([0, 1])
    refused = "no argument of Sequential has 2 samples: enter use_context with a label for each it"
    with normswap.use_context(model, labels), pytest.raises(ContextError, match=refused):
        model.draw(x, 2)
    with normswap.use_context(model, labels.repeat_interleave(2)):
        drawn = model.draw(x, 2)
    torch.testing.assert_close(drawn, model(x, context=labels).repeat_interleave(2, 0))


class Draws(nn.Module):
    """Normalises several draws of each sample in turn, as a decoder of scvi-tools does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, draws, size):
        return size * torch.stack([self.norm(draw) for draw in draws])


def test_samples_in_another_dimension_are_pointed_at():
    model = normswap.convert(Draws().eval(), "cn", contexts=2)
    draws, size, labels = torch.randn(3, 7, 6), torch.rand(7, 1), torch.arange(7) % 2
    hint = r"\(samples are dimension 0, and one argument is a tensor \(3, 7, 6\) of float32\)"
    with pytest.raises(ContextError, match=hint):
        model(draws, size, context=labels)
    assert model(draws, size, context="1").shape == draws.shape


class Split(nn.BatchNorm1d):
    """In training normalises halves of a batch apart, as timm's SplitBatchNorm2d does."""

    def __init__(self, channels):
        super().__init__(channels)
        self.other = nn.BatchNorm1d(channels)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        one, two = x.chunk(2)
        return torch.cat([super().forward(one), self.other(two)])


def test_a_norm_that_measuring_does_not_reach_is_said_to_be_so():
    model = normswap.convert(nn.Sequential(nn.Linear(6, 6), Split(6)), "cn", contexts=2)
    x, labels = torch.randn(8, 6), torch.arange(8) % 2
    with pytest.raises(ContextError, match=r"do not reach it\).* exclude='1.other'"):
        model(x, context=labels)
    assert model(x, context="1").shape == x.shape
    assert model.eval()(x, context=labels).shape == x.shape
