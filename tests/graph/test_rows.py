"""Labels follow the samples however a model folds more into the batch."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError
from tests.graph import behave

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


def neither(x):
    return x.reshape(-1, x.shape[-1])[[*range(1, x.shape[0] * x.shape[1]), 0]]


def apart(model):
    """Give every context its own statistics and affine."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNorm):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    tensor.add_(torch.rand_like(tensor))
    return model


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


@FOLDS
def test_what_was_learnt_of_the_layout_is_copied_and_pickled(fold, unfold):
    model = converted(fold, unfold)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    expected = model(x, context=LABELS)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.norm.scope.rows.layouts == model.norm.scope.rows.layouts != {}
        assert clone(x, context=LABELS).equal(expected)


def test_learning_the_layout_updates_statistics_once_and_draws_nothing():
    model = converted(innermost, from_innermost).train()
    reference = copy.deepcopy(model)
    reference.norm.scope.rows.layouts["norm", 5] = "samples innermost"
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    assert model(x, context=LABELS).equal(reference(x, context=LABELS))
    assert torch.get_rng_state().equal(state)
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert a.equal(b), name
    assert all(m.training for m in model.modules())


def test_a_model_that_folds_nothing_runs_once():
    calls = []
    model = normswap.convert(nn.Sequential(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)), contexts=K)
    model[0].register_forward_hook(lambda *given: calls.append(1))
    model.eval()(torch.randn(N, 6, 5), context=LABELS)
    assert calls == [1]


def test_rows_in_another_order_are_an_error_that_names_the_norm():
    model = converted(neither, from_outermost)
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    with pytest.raises(ContextError, match="rows of the input of norm to be the samples in order"):
        model(x, context=LABELS)
    assert model(x, context="1").shape == (N, 5, 6)


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
