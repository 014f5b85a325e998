"""Labels follow samples in whatever steady order a model puts them."""

import copy

import pytest
import torch
from torch import nn
from torch.func import vmap

import normswap
from normswap.errors import ContextError
from tests.support.rows import (
    LABELS,
    ORDERS,
    K,
    N,
    apart,
    check,
    ordered,
    pairs,
    rows_of,
    singly,
    taken,
)

TAILS = {
    "swapped": lambda n: [*range(n - 2), n - 1, n - 2],
    "turned around": lambda n: [0, 1, 2, *range(n - 1, 2, -1)],
}


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize(("tail", "samples"), [("swapped", 5), ("turned around", 9)])
def test_orders_that_leave_the_first_three_samples_in_place(tail, samples, trace):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(x[TAILS[tail](len(x))])

    model = apart(normswap.convert(Model().eval(), "cn", contexts=K, trace=trace))
    x, labels = torch.randn(samples, 6), torch.arange(samples) % K
    order = TAILS[tail](samples)
    assert model(x, context=labels).equal(model.norm(x[order], context=labels[order]))


OF_NUMBERS = {
    "of two where they divide": lambda n: (
        torch.arange(n).view(2, -1).T.flatten() if n % 2 == 0 else None
    ),
    "turned around where odd": lambda n: torch.arange(n).flip(0) if n % 2 else None,
    "turned around from six on": lambda n: torch.arange(n).flip(0) if n > 5 else None,
}


@pytest.mark.parametrize("samples", [(6, 7, 8, 33), (7, 6, 32, 10, 12, 15), (5, 8), (3, 4, 2, 9)])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_an_order_that_depends_on_the_number_of_samples(name, samples):
    def regrouped(s, x):
        order = OF_NUMBERS[name](len(x))
        return s.norm(x) if order is None else taken(s, x, order)

    check(ordered(regrouped), samples)


@pytest.mark.parametrize("groups", [lambda x: x.view(5, -1, 6), lambda x: x.view(-1, 5, 6)])
@pytest.mark.parametrize("samples", [(10, 15), (5, 10), (30, 5)])
def test_groups_of_five_samples_that_are_transposed(groups, samples):
    def transposed(s, x):
        if len(x) == 1:
            return s.norm(x)
        order = groups(torch.arange(len(x))[:, None].expand(-1, 6))[..., 0].T.flatten()
        return taken(s, x, order)

    check(ordered(transposed), samples)


@pytest.mark.parametrize("name", ORDERS)
def test_rows_in_any_steady_order_equal_samples_one_by_one(name):
    model = ordered(ORDERS[name])
    check(model)
    with torch.no_grad():
        check(model)
    model.train()(torch.randn(4, 6, dtype=torch.float64), context=LABELS)
    model.flag = True
    check(model.eval())


@pytest.mark.parametrize("name", ["flipped", "pairs", "pieces of two"])
def test_training_on_rows_in_a_steady_order_equals_a_loop_over_contexts(name):
    # One call of the norm in each, with labels by hand; pieces are contexts' samples by twos.
    model = ordered(ORDERS[name]).train()
    hand = copy.deepcopy(model)
    x = torch.randn(N, 6, dtype=torch.float64)
    y = model(x, context=LABELS)
    h = hand.linear(x)
    if name == "flipped":
        expected = hand.norm(h.flip(0), context=LABELS.flip(0)).flip(0)
    elif name == "pairs":
        one, two = hand.norm(torch.cat([h, 2 * h]), context=LABELS.repeat(2)).chunk(2)
        expected = one * two
    else:
        parts = zip(h.split(2), LABELS.split(2), strict=True)
        expected = torch.cat([hand.norm(part, context=labels) for part, labels in parts])
    assert y.equal(expected)
    for (key, a), (_, b) in zip(model.named_buffers(), hand.named_buffers(), strict=True):
        assert a.equal(b), key


def test_a_norm_that_a_forward_calls_for_each_piece_of_a_batch_is_said_to_have_several_orders():
    model = ordered(ORDERS["pieces of two"])
    check(model, (4, 6))
    assert rows_of(model) == {"norm": "permuted, in several orders"}


def test_rows_that_no_sample_moves_tell_no_order_of_later_calls():
    model = ordered(lambda s, x: s.norm(x.flip(0)).flip(0))
    weight = model.linear.weight.detach().clone()
    torch.nn.init.zeros_(model.linear.weight)
    model(torch.randn(4, 6, dtype=torch.float64), context=LABELS)
    assert rows_of(model)["norm"].startswith("not measured")
    with torch.no_grad():
        model.linear.weight.copy_(weight)
    check(model)


def test_dropout_in_a_forward_does_not_hide_the_order():
    model = ordered(lambda s, x: pairs(s, nn.functional.dropout(x, 0.5, s.training))).train()
    model(torch.randn(4, 6, dtype=torch.float64), context=LABELS)
    assert rows_of(model) == {"norm": "repeated x2"}


def test_an_irregular_order_is_measured_in_each_call_unless_declared_fixed(never_again):
    model = ordered(ORDERS["flipped"])
    normswap.fix_rows(model)
    check(model, (4, 4, 3))
    never_again()
    check(model, (4, 3))
    assert rows_of(model) == {"norm": "permuted"}
    normswap.fix_rows(model, False)
    with pytest.raises(AssertionError, match="measured again"):
        check(model, (4,))


def test_only_a_converted_model_has_rows_to_fix():
    with pytest.raises(normswap.ConversionError, match=r"call normswap\.convert first"):
        normswap.fix_rows(nn.Linear(2, 2))


def skipping(s, x):
    if torch.rand(()) < 0.5:
        x = s.norm(x)
    return s.norm(s.linear(s.norm(x)))


def test_layers_skipped_at_random_are_one_per_sample():
    model = ordered(skipping)
    x = torch.randn(4, 6, dtype=torch.float64)
    for seed in range(12):
        torch.manual_seed(seed)
        y = model(x, context=LABELS)
        parts = []
        for i in range(4):
            torch.manual_seed(seed)
            parts.append(model(x[i : i + 1], context=LABELS[i : i + 1]))
        assert torch.allclose(y, torch.cat(parts))


def test_layers_that_a_call_meets_first_at_random_are_one_per_sample():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                if torch.rand(()) < 0.3:
                    x = x + layer(x)
            return x

    x = torch.randn(N, 6)
    for seed in range(6):
        model = apart(normswap.convert(Skipping().eval(), "cn", contexts=K))
        for call in range(6):
            drawn = []
            for context in (LABELS, *range(K)):
                torch.manual_seed(31 * seed + call)
                drawn.append((model(x, context=context), torch.rand(())))
            (y, number), *singles = drawn
            assert y.equal(torch.stack([singles[k][0][i] for i, k in enumerate(LABELS)]))
            assert all(number == other for _, other in singles)


def test_an_order_that_is_the_same_in_a_square_of_rows_is_told():
    def transposed(s, x):
        index = torch.arange(3 * len(x))
        for _ in range(2):
            index = index.view(-1, 3).T.flatten()
        tokens = torch.stack([x, 2 * x, 3 * x], 1).flatten(0, 1)
        return taken(s, tokens, index).unflatten(0, (-1, 3)).prod(1)

    check(ordered(transposed), (3, 5, 4, 6, 3))


@pytest.mark.parametrize("trace", [True, False])
def test_a_forward_that_is_set_later_is_measured_anew(trace):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(x)

    model = apart(normswap.convert(nn.Sequential(Child()).eval(), "cn", contexts=K, trace=trace))
    x = torch.randn(N, 6)
    child = model[0]
    assert model(x, context=LABELS).equal(child.norm(x, context=LABELS))
    child.forward = lambda x: child.norm(x.flip(0))
    assert model(x, context=LABELS).equal(child.norm(x.flip(0), context=LABELS.flip(0)))


def test_orders_are_measured_after_a_transform_of_torch_func_could_not():
    model = ordered(ORDERS["flipped"])
    x = torch.randn(N, 6, dtype=torch.float64)
    vmap(lambda x: model(x, context=LABELS))(x[None])
    assert torch.allclose(model(x, context=LABELS), singly(model, x))
    with pytest.raises(ContextError, match="under a transform of torch"):
        vmap(lambda x: model(x, context=LABELS))(x[None])
    normswap.fix_rows(model)
    model(x, context=LABELS)
    found = vmap(lambda x: model(x, context=LABELS))(x[None])
    assert torch.allclose(found[0], singly(model, x))


@pytest.mark.parametrize("offset", [4e7, 1e12])
@pytest.mark.parametrize("order", [lambda x: x, lambda x: x.flip(0)], ids=["kept", "turned"])
def test_statistics_that_do_not_fit_yet_hide_no_samples(order, offset):
    """As those after a step of training from scratch: little or nothing is left of a sample."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x):
            return order(self.second(order(self.first(x))))

    model = Model().eval()
    model.first.running_mean.fill_(offset)
    model = normswap.convert(model, "cn", contexts=K, verify=False)
    with torch.no_grad():
        model.second.bias.copy_(torch.arange(K).unsqueeze(1) * offset)
    torch.manual_seed(1)
    x = torch.randn(N, 6)
    torch.testing.assert_close(model(x, context=LABELS), singly(model, x))
