"""Labels follow samples whose rows a model folds into the batch, or repeats."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from tests.support import behave
from tests.support.rows import (
    FOLDS,
    LABELS,
    Folding,
    K,
    N,
    TwoViews,
    apart,
    check,
    converted,
    from_innermost,
    from_outermost,
    innermost,
    ordered,
    outermost,
    rows_of,
    singly,
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
    model(x[:6], context=torch.tensor([0, 1, 2, 0, 1, 2]))
    never_again()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    assert torch.allclose(model(x, context=labels), singly(model, x, labels), rtol=1e-12)


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


@pytest.mark.parametrize("trace", [True, False])
def test_a_model_that_calls_itself_on_views_of_its_samples(trace):
    class Augmenting(TwoViews):
        def forward(self, x, views=False):
            if views:
                return sum(self(torch.cat([x, 2 * x])).chunk(2))
            return self.norm(x)

    converted = normswap.convert(Augmenting().double().eval(), "cn", contexts=K, trace=trace)
    model, x = apart(converted), torch.randn(N, 6, dtype=torch.float64)
    singly = [model(x[i : i + 1], True, context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(model(x, views=True, context=LABELS), torch.cat(singly), rtol=1e-12)
    with pytest.raises(normswap.ContextError, match=f"with {N + 1} labels"):
        model(torch.cat([x, x[:1]]), True, context=LABELS)


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


def test_sizes_stop_to_matter_after_some_were_alike(never_again):
    model = converted(outermost, from_outermost)
    for length in (2, 3, 6):
        model(torch.randn(N, length, 6, dtype=torch.float64), context=LABELS)
    never_again()
    x = torch.randn(N, 9, 6, dtype=torch.float64)
    assert torch.allclose(model(x, context=LABELS), singly(model, x))


def test_a_hook_that_adds_views_is_seen():
    model = ordered(lambda s, x: s.norm(x).unflatten(0, (2, -1)).prod(0))
    hook = model.linear.register_forward_pre_hook(lambda m, args: (torch.cat([args[0], -args[0]]),))
    check(model, (4, 3))
    hook.remove()
