"""Labels follow the samples however a model folds more into the batch."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError

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
