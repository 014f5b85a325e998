"""Labels follow the samples however a model orders, folds or repeats them."""

import copy
import pickle
import random
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap import ContextError
from normswap.graph.rows.run import Run
from tests.support import behave

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


@FOLDS
@pytest.mark.parametrize("train_first", [False, True])
def test_a_mixed_batch_equals_its_samples_one_by_one(fold, unfold, train_first):
    model = converted(fold, unfold)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    if train_first:
        model.train()(x, context=LABELS)
        model.eval()
    together = model(x, context=LABELS)
    singly = [model(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(together, torch.cat(singly), rtol=1e-12)
    assert not torch.allclose(together, model(x, context=LABELS.flip(0)))


@pytest.fixture
def never_again(monkeypatch):
    """Return what makes any further measurement an error."""

    def refuse():
        def measure(*args, **kwargs):
            raise AssertionError("measured again")

        monkeypatch.setattr(Run, "measure", measure)

    return refuse


@FOLDS
def test_what_was_measured_is_copied_and_pickled(fold, unfold, never_again):
    model = converted(fold, unfold)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    expected = model(x, context=LABELS)
    never_again()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert rows_of(clone) == rows_of(model)
        assert clone(x, context=LABELS).equal(expected)


@FOLDS
def test_what_was_measured_holds_for_any_number_of_samples(fold, unfold, never_again):
    model = converted(fold, unfold)
    x = torch.randn(7, 4, 6, dtype=torch.float64)
    model(x[:5], context=torch.tensor([0, 1, 2, 0, 1]))
    never_again()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    assert torch.allclose(model(x, context=labels), singly(model, x, labels), rtol=1e-12)


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


@pytest.mark.parametrize("trace", [True, False])
def test_compiled_training_of_what_flips_in_eval_is_refused(trace):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(x.flip(0))

    x = torch.randn(N, 6)
    model = normswap.convert(Model(), "cn", contexts=K, trace=trace, example_inputs=x)
    torch._dynamo.reset()
    with pytest.raises(ContextError, match="nothing that tells"):
        torch.compile(model.train(), backend="eager")(x, context=LABELS)


def test_measuring_updates_statistics_once_and_draws_nothing():
    model = converted(innermost, from_innermost).train()
    reference = copy.deepcopy(model)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    states = torch.get_rng_state(), random.getstate()
    y = model(x, context=LABELS)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    tokens = reference.first(x.transpose(1, 2), context=LABELS).transpose(1, 2)
    expected = reference.norm(innermost(tokens), context=LABELS.repeat(5))
    assert y.equal(from_innermost(expected, N))
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert a.equal(b), name
    assert all(m.training for m in model.modules())


def test_one_backbone_on_two_concatenated_inputs():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, one, other):
            first, second = self.backbone(torch.cat([one, other])).chunk(2)
            return (first - second).flatten(1)

    model = apart(normswap.convert(Siamese().double().eval(), "cn", contexts=K))
    one, other = torch.randn(2, N, 3, 8, 8, dtype=torch.float64)
    together = model(one, other, context=LABELS)
    singly = [model(one[i : i + 1], other[i : i + 1], LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(together, torch.cat(singly), rtol=1e-10, atol=1e-12)


def test_a_submodule_called_by_itself_learns_the_layout():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Folding(innermost, from_innermost)

        def forward(self, x):
            return self.body(x)

    model = apart(normswap.convert(Whole().double().eval(), "cn", contexts=K))
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    singly = [model.body(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(model.body(x, context=LABELS), torch.cat(singly), rtol=1e-12)
    with normswap.use_context(model, LABELS):
        assert torch.allclose(model.body(x), torch.cat(singly), rtol=1e-12)


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


def test_a_fold_met_in_training_only_equals_a_loop_over_contexts():
    model = normswap.convert(TwoViews().double(), "cn", contexts=K).train()
    x = torch.randn(N, 6, dtype=torch.float64)
    y = model(x, context=LABELS)
    rows, labels = torch.cat([x, x * 2]), LABELS.repeat(2)
    for label in range(K):
        chosen = rows[labels == label]
        expected = (chosen - chosen.mean(0)) / (chosen.var(0, correction=0) + 1e-5).sqrt()
        assert torch.allclose(y[labels == label], expected)
        assert torch.allclose(model.norm.running_mean[label], 0.1 * chosen.mean(0))


def test_what_a_forward_changes_changes_once():
    model = normswap.convert(TwoViews().double(), "cn", contexts=K).train()
    x = torch.randn(N, 6, dtype=torch.float64)
    model(x, context=LABELS)
    assert model.calls == 1
    assert torch.allclose(model.average, x.mean(0))
    assert model.norm.num_batches_tracked.tolist() == [1, 1, 1]


def test_verification_leaves_no_trace_in_the_original():
    original = TwoViews()
    normswap.convert(original, "cn", contexts=K, example_inputs=torch.randn(2, 6))
    assert original.calls == 0
    assert original.average.equal(torch.zeros(6))


@pytest.mark.parametrize("spoil", ["equal samples", "one sample", "zeros", "not a number"])
def test_an_odd_first_batch_does_not_settle_a_wrong_layout(spoil):
    model = converted(innermost, from_innermost)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    first = {
        "equal samples": x[:1].expand_as(x).clone(),
        "one sample": x[:1],
        "zeros": torch.zeros_like(x),
        "not a number": x.index_fill(0, torch.tensor([1]), torch.nan),
    }[spoil]
    model(first, context=LABELS[: len(first)])
    singly = [model(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(model(x, context=LABELS), torch.cat(singly), rtol=1e-12)


@FOLDS
def test_an_export_after_one_call_knows_the_layout(fold, unfold):
    model = converted(fold, unfold)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    expected = model(x, context=LABELS)
    exported = torch.export.export(model, (x,), {"context": LABELS}).module()
    assert torch.allclose(exported(x, context=LABELS), expected)


def test_a_norm_also_held_in_a_plain_list_is_replaced_there_too():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("norm", nn.BatchNorm1d(6))
            self.layers = [self.norm]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    original = Held().double().eval()
    model = apart(normswap.convert(original, "cn", contexts=K))
    assert model.layers[0] is model.norm
    assert original.layers[0] is original.norm
    x = torch.randn(N, 6, dtype=torch.float64)
    singly = [model(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(model(x, context=LABELS), torch.cat(singly), rtol=1e-12)
    assert not model(x, context=LABELS).allclose(model(x))


def test_a_norm_held_by_a_bound_method_is_refused():
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.function = self.norm.forward

        def forward(self, x):
            return self.function(x)

    model = Bound()
    with pytest.raises(normswap.ConversionError, match="holds a norm to be replaced"):
        normswap.convert(model, inplace=True)
    assert isinstance(model.norm, nn.BatchNorm1d)


def test_samples_that_hardly_differ_at_a_norm_still_tell_the_layout():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            tokens = 1 + x.flatten(2).transpose(1, 2) * 1e-7
            return self.norm(tokens.flatten(0, 1)).unflatten(0, (x.shape[0], -1))

    model = Faint().double().eval()
    converted = normswap.convert(model, "cn", contexts=3, verify=False)
    behave.separate(converted)
    x, labels = behave.images().double(), behave.LABELS
    mixed = converted(x, context=labels)
    alone = [converted(x[i : i + 1], context=labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(mixed, torch.cat(alone))


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
    with pytest.raises(ContextError, match=rf"input of norm .*{cause}.*exclude='norm'"):
        model(x, context=LABELS)
    # One context for all is no question of rows.
    assert torch.isfinite(model(x, context=torch.ones(4, dtype=torch.int64))).all()
    assert torch.isfinite(model(x, context="1")).all()


@pytest.mark.parametrize(("step", "told"), [(1e-15, True), (1e-6, False)])
def test_rows_of_dead_activations_are_equal_but_for_rounding(step, told):
    def dead(s, x):
        return s.norm((-x.abs()).relu() + 1 + step * torch.arange(len(x)).unsqueeze(1))

    model, x = ordered(dead), torch.randn(4, 6, dtype=torch.float64)
    if not told:
        with pytest.raises(ContextError, match="4 rows from no sample of 4"):
            model(x, context=LABELS)
        return
    y = model.norm(torch.ones_like(x), context=LABELS)
    torch.testing.assert_close(model(x, context=LABELS), y)


@contextmanager
def refusal(part):
    """Take a ContextError that says this; another error, or none, passes."""
    try:
        yield
    except ContextError as error:
        if part not in str(error):
            raise


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


def test_two_samples_sorted_by_value_are_refused_in_every_call():
    model = ordered(by_value)
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


def test_sizes_stop_to_matter_after_some_were_alike(never_again):
    model = converted(outermost, from_outermost)
    for length in (2, 3, 6):
        model(torch.randn(N, length, 6, dtype=torch.float64), context=LABELS)
    never_again()
    x = torch.randn(N, 9, 6, dtype=torch.float64)
    assert torch.allclose(model(x, context=LABELS), singly(model, x))


def test_hooks_of_the_user_run_once_a_call_and_modes_and_flags_stay():
    model = ordered(ORDERS["pairs"]).train()
    calls = []
    for module in (model, model.linear, model.norm):
        module.register_forward_pre_hook(lambda m, args: calls.append("before"))
        module.register_forward_hook(lambda m, args, y: calls.append("after"))
    model(torch.randn(N, 6, dtype=torch.float64), context=LABELS)
    assert calls.count("before") == calls.count("after") == 3
    assert len(model.linear._forward_hooks) == len(model.linear._forward_pre_hooks) == 1


def test_a_hook_that_adds_views_is_seen():
    model = ordered(lambda s, x: s.norm(x).unflatten(0, (2, -1)).prod(0))
    hook = model.linear.register_forward_pre_hook(lambda m, args: (torch.cat([args[0], -args[0]]),))
    check(model, (4, 3))
    hook.remove()


def test_weights_that_a_hook_of_torch_computes_are_computed():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6)).eval()

    model = apart(normswap.convert(build(), "cn", contexts=K, verify=False))
    x = torch.randn(N, 6)
    assert torch.allclose(model(x, context=LABELS), singly(model, x), atol=1e-6)
    assert rows_of(model) == {"1": "one per sample"}


class Packed(nn.Module):
    """Norms the steps of sequences of several lengths, packed."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        packed = packed._replace(data=self.norm(packed.data))
        return self.lstm(packed)[1][0][0]


def test_packed_sequences_equal_samples_one_by_one():
    model = apart(normswap.convert(Packed().double().eval(), "cn", contexts=K, verify=False))
    x = torch.randn(N, 7, 6, dtype=torch.float64)
    for lengths in (torch.tensor([7, 5, 5, 2]), torch.tensor([6, 6, 3, 1])):
        y = model(x, lengths, context=LABELS)
        parts = [model(x[i : i + 1], lengths[i : i + 1], LABELS[i : i + 1]) for i in range(N)]
        assert torch.allclose(y, torch.cat(parts))


def test_values_out_of_range_are_never_given_to_a_model():
    def bounded(s, x):
        return s.norm(x)

    class Bounded(Rows):
        def forward(self, x):
            assert 0 <= x.min() <= x.max() <= 1
            return super().forward(x)

    model = apart(normswap.convert(Bounded(bounded).eval(), "cn", contexts=K, verify=False))
    x = torch.rand(N, 6)
    assert torch.allclose(model(x, context=LABELS), singly(model, x), atol=1e-6)
    assert rows_of(model) == {"norm": "one per sample"}


class Fragile(nn.Module):
    """Takes one batch only."""

    def __init__(self, fold):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.only = None
        self.fold = fold

    def forward(self, x):
        if self.only is not None and not torch.equal(x, self.only):
            raise ValueError("another batch")
        return self.norm(torch.cat([x, x]) if self.fold else x)


def test_a_model_that_cannot_be_measured_goes_on_where_rows_are_samples():
    model = normswap.convert(Fragile(False).eval(), "cn", contexts=K, verify=False)
    model.only = torch.randn(N, 6)
    model(model.only, context=LABELS)
    (found,) = rows_of(model).values()
    assert found.startswith("not measured: ")
    assert "ValueError: another batch" in found


def test_a_model_that_cannot_be_measured_is_an_error_where_rows_are_more():
    model = normswap.convert(Fragile(True).eval(), "cn", contexts=K, verify=False)
    model.only = torch.randn(N, 6)
    with pytest.raises(ContextError, match=r"ValueError: another batch.*exclude='norm'"):
        model(model.only, context=LABELS)
    model.only = None
    assert model(torch.randn(N, 6), context=LABELS).shape == (2 * N, 6)


def test_an_argument_that_can_be_read_only_once_is_left_alone():
    class Reading(Rows):
        def forward(self, parts):
            return super().forward(torch.stack(list(parts)))

    model = apart(normswap.convert(Reading(ORDERS["as they are"]), "cn", contexts=K, verify=False))
    x = torch.randn(N, 6)
    y = model.eval()(iter(x), context=LABELS)
    parts = [model(iter(x[i : i + 1]), context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(y, torch.cat(parts), atol=1e-6)
    assert "not measured" in rows_of(model)["norm"]


def test_norms_with_children_are_in_eval_while_a_model_is_measured():
    timm = pytest.importorskip("timm")

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("efficientnet_lite0", num_classes=3)

        def forward(self, x):
            one, two = self.body(torch.cat([x, 2 * x])).chunk(2)
            return one * two

    model = normswap.convert(Siamese(), "cn", contexts=K, verify=False).train()
    model(torch.randn(N, 3, 32, 32), context=LABELS)
    assert set(rows_of(model).values()) == {"repeated x2"}
    assert all(module.training for module in model.modules())


def test_a_norm_that_was_left_out_is_in_eval_too():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = normswap.convert(model, "cn", contexts=K, exclude="0", verify=False).train()
    model(torch.randn(N, 6), context=LABELS)
    assert rows_of(model) == {"0": "", "2": "one per sample"}
    assert model[0].num_batches_tracked == 1


def test_rows_are_measured_at_conversion_where_there_are_inputs():
    model = Folding(innermost, from_innermost)
    x = torch.randn(2, 5, 6)
    model = normswap.convert(model, "cn", contexts=K, example_inputs=x)
    assert rows_of(model) == {"first": "one per sample", "norm": "repeated x5"}
    assert "repeated x5" in str(normswap.summary(model))


def test_verification_measures_rows():
    original = Folding(outermost, from_outermost)
    model = normswap.convert(original, "cn", contexts=K)
    assert set(rows_of(model).values()) == {"not measured: no batch of several contexts has run"}
    normswap.verify(model, original, torch.randn(2, 5, 6))
    assert rows_of(model) == {"first": "one per sample", "norm": "folded x5"}


def test_a_compiled_fold_that_was_not_measured_is_refused():
    model = converted(innermost, from_innermost)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    with pytest.raises(Exception, match="run the whole model in this mode, not compiled"):
        torch.export.export(model, (x,), {"context": LABELS})


def test_a_compiled_flip_is_refused_unless_fixed():
    torch._dynamo.reset()
    model = ordered(ORDERS["flipped"])
    x = torch.randn(N, 6, dtype=torch.float64)
    model(x, context=LABELS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="got nothing that tells"):
        compiled(x, context=LABELS)
    torch._dynamo.reset()
    normswap.fix_rows(model)
    expected = model(x, context=LABELS)
    assert torch.allclose(compiled(x, context=LABELS), expected)


def test_compiled_chunks_that_share_a_norm_are_refused_though_fixed():
    torch._dynamo.reset()
    model = ordered(lambda s, x: torch.cat([s.norm(part) for part in x.chunk(2)]))
    normswap.fix_rows(model)
    x = torch.randn(N, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model(x, context=LABELS), singly(model, x, LABELS))
    with pytest.raises(Exception, match="another in each of several calls"):
        torch.compile(model, backend="eager", fullgraph=True)(x, context=LABELS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_chunks_that_share_a_norm_are_recomputed_in_their_order_or_refused(reentrant):
    model = ordered(lambda s, x: torch.cat([s.norm(part) for part in x.chunk(2)]))
    normswap.fix_rows(model)
    xs = [torch.randn(N, 6, dtype=torch.float64, requires_grad=True)]
    xs.append(xs[0].detach().clone().requires_grad_())
    copy.deepcopy(model)(xs[0], context=LABELS).square().sum().backward()
    y = checkpoint(lambda x: model(x, context=LABELS), xs[1], use_reentrant=reentrant)
    if reentrant:  # without gradients the forward may have taken another way
        with pytest.raises(ContextError, match=r"got nothing that tells.*exclude='norm'"):
            y.square().sum().backward()
    else:
        y.square().sum().backward()
        assert torch.allclose(xs[1].grad, xs[0].grad)


def test_threads_do_not_mix_what_they_measure():
    from concurrent.futures import ThreadPoolExecutor

    model = ordered(ORDERS["pairs"])
    batches = [torch.randn(n, 6, dtype=torch.float64) for n in (2, 3, 4, 5) * 6]

    def run(x):
        labels = torch.arange(len(x)) % K
        with torch.no_grad():
            return torch.allclose(model(x, context=labels), singly(model, x, labels))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, batches))
    assert rows_of(model) == {"norm": "repeated x2"}


def test_inputs_of_every_form_are_told_apart():
    class Taking(Rows):
        def forward(self, batch, *, scale=None):
            x = batch["images"] if isinstance(batch, dict) else torch.stack(batch)
            return super().forward(x if scale is None else x * scale)

    model = apart(
        normswap.convert(Taking(ORDERS["flipped"]).double(), "cn", contexts=K, verify=False)
    ).eval()
    x = torch.randn(N, 6, dtype=torch.float64)
    scale = torch.rand(N, 1, dtype=torch.float64)
    for given in (lambda t: {"images": t}, list):
        y = model(given(x), scale=scale, context=LABELS)
        each = [(given(x[i : i + 1]), scale[i : i + 1], LABELS[i : i + 1]) for i in range(N)]
        parts = [model(batch, scale=one, context=label) for batch, one, label in each]
        assert torch.allclose(y, torch.cat(parts))
    assert rows_of(model) == {"norm": "permuted"}


def test_images_of_several_sizes_are_samples():
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images, targets):
            size = [max(i.shape[d] for i in images) for d in (1, 2)]
            batch = images[0].new_zeros(len(images), 3, *size)
            for image, place in zip(images, batch, strict=True):
                place[:, : image.shape[1], : image.shape[2]] = image
            return self.norm(batch).mean((2, 3)) * torch.stack([t["w"] for t in targets])

    model = apart(normswap.convert(Ragged().double().eval(), "cn", contexts=K, verify=False))
    images = [torch.rand(3, 5 + i, 9 - i, dtype=torch.float64) for i in range(N)]
    targets = [{"w": torch.rand(3, dtype=torch.float64)} for _ in range(N)]
    y = model(images, targets, context=LABELS)
    assert rows_of(model) == {"norm": "one per sample"}
    flipped = model(images[::-1], targets[::-1], context=LABELS.flip(0))
    assert torch.allclose(y, flipped.flip(0))


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


@pytest.mark.parametrize("seed", range(8))
def test_an_order_drawn_from_a_generator_of_the_model_is_an_error(seed):
    with pytest.raises(ContextError, match="changes from call to call"):
        own(True, seed)(torch.randn(N, 6), context=LABELS)


def test_noise_drawn_from_a_generator_of_the_model_is_drawn_once():
    model, reference = own(False, 0), torch.Generator().manual_seed(0)
    model(torch.randn(N, 6), context=LABELS)
    torch.rand(N, 6, generator=reference)
    assert torch.equal(model.generator.get_state(), reference.get_state())
    assert rows_of(model) == {"norm": "one per sample"}


def test_an_order_that_is_the_same_in_a_square_of_rows_is_told():
    def transposed(s, x):
        index = torch.arange(3 * len(x))
        for _ in range(2):
            index = index.view(-1, 3).T.flatten()
        tokens = torch.stack([x, 2 * x, 3 * x], 1).flatten(0, 1)
        return taken(s, tokens, index).unflatten(0, (-1, 3)).prod(1)

    check(ordered(transposed), (3, 5, 4, 6, 3))


def test_a_first_call_under_checkpointing_saves_for_backward_what_it_would():
    from torch.utils.checkpoint import checkpoint

    model = ordered(ORDERS["pairs"])
    x = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    y = checkpoint(lambda x: model(x, context=LABELS), x, use_reentrant=False)
    (found,) = torch.autograd.grad(y.sin().sum(), x)
    (expected,) = torch.autograd.grad(model(x, context=LABELS).sin().sum(), x)
    assert torch.allclose(found, expected)


class Registry(dict):
    """Stores under another key than it is given, as that of transformers does."""

    def __setitem__(self, key, value):
        super().__setitem__(f"<{key}>", value)


REGISTRY = Registry()
REGISTRY["known"] = 2.0


class Looking(Rows):
    sizes: ClassVar = list[int]

    def forward(self, x):
        return super().forward(x) * REGISTRY["<known>"]


def test_what_a_forward_looks_up_stays_and_may_name_a_generic_type():
    model = normswap.convert(
        Looking(lambda s, x: s.norm(s.linear(x))).double().eval(), "cn", contexts=K, verify=False
    )
    check(apart(model))
    assert rows_of(model) == {"norm": "one per sample"}
    assert REGISTRY == {"<known>": 2.0}


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
