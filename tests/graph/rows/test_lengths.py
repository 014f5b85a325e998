"""Rows whose order follows what goes beside the samples: lengths, masks, padding, an order."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normswap
from normswap import ContextError
from normswap.graph.rows.measure import Measurement
from tests.support.rows import LABELS, K, N, apart


class Steps(nn.Module):
    """Norms the steps that count, those `pick` makes of sequences (N, T, 6) and what goes along."""

    def __init__(self, pick):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.pick = pick

    def forward(self, x, beside):
        counted = self.pick(x, beside)
        y = torch.zeros_like(x)
        y[counted] = self.norm(x[counted])
        return y


class Packed(Steps):
    def forward(self, x, beside):
        packed = pack_padded_sequence(x, beside, batch_first=True, enforce_sorted=False)
        y = packed._replace(data=self.norm(packed.data))
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]


class Chosen(Steps):
    def forward(self, x, beside):
        order = beside.argsort()
        return self.norm(x[order].mean(1))[order.argsort()]


class LongestFirst(Steps):
    def forward(self, x, beside):
        order = beside.argsort(descending=True)
        return self.norm(x[order].mean(1))[order.argsort()]


class Grouped(Steps):
    kinds = 0, 1, 2

    def forward(self, x, beside):
        order = torch.cat([(beside == kind).nonzero()[:, 0] for kind in self.kinds])
        return self.norm(x[order].mean(1))[order.argsort()]


class GroupedFromTheLast(Grouped):
    kinds = 2, 1, 0


def mask(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# How a model tells which steps count, and what it is given for that, from lengths.
FORMS = {
    "lengths": (Steps(lambda x, n: mask(n.tolist(), x.shape[1])), lambda n, _: torch.tensor(n)),
    "list": (Steps(lambda x, n: mask(n, x.shape[1])), lambda n, _: list(n)),
    "mask": (Steps(lambda x, m: m), mask),
    "mask of what is left out": (Steps(lambda x, m: ~m), lambda n, steps: ~mask(n, steps)),
    "packed": (Packed(None), lambda n, _: torch.tensor(n)),
    "order": (Chosen(None), lambda n, _: torch.tensor(n)),
    "longest first": (LongestFirst(None), lambda n, _: torch.tensor(n)),
    "kind": (Grouped(None), lambda n, _: torch.tensor(n) % 3),
    "kind, the last first": (GroupedFromTheLast(None), lambda n, _: torch.tensor(n) % 3),
    "flag": (Grouped(None), lambda n, _: torch.tensor(n) > 5),
    "flag, those that have it first": (
        GroupedFromTheLast(None),
        lambda n, _: torch.tensor(n) > 5,
    ),
    "flag that all have, first": (GroupedFromTheLast(None), lambda n, _: torch.tensor(n) != 2),
}


@pytest.mark.parametrize(("model", "beside"), FORMS.values(), ids=FORMS)
def test_lengths_of_another_batch_with_as_many_rows_tell_its_order(model, beside):
    model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
    for lengths in (
        [6] * N,
        [5] * N,
        [4] * N,
        [7] * N,
        [7, 2, 6, 5],
        [2, 7, 5, 6],
        [3] * N,
        [1, 4, 5, 2],
    ):
        for steps in (7, 9):
            x = torch.randn(N, steps, 6, dtype=torch.float64)
            x *= mask(lengths, steps)[:, :, None]
            y = model(x, beside(lengths, steps), context=LABELS)
            one = [(x[i : i + 1], beside(lengths[i : i + 1], steps)) for i in range(N)]
            parts = [model(*part, context=LABELS[i : i + 1]) for i, part in enumerate(one)]
            torch.testing.assert_close(y, torch.cat(parts))


def test_padding_that_only_values_tell_is_never_misread():
    model = Steps(lambda x, _: x.abs().sum(2) > 0)
    model = apart(normswap.convert(model.eval(), "cn", contexts=K, verify=False))
    for lengths in ([6] * N, [5] * N, [4] * N, [7] * N):
        model(torch.randn(N, 7, 6) * mask(lengths, 7)[:, :, None], None, context=LABELS)
    with pytest.raises(ContextError, match=r"depends on their values.*exclude='norm'"):
        model(torch.randn(N, 7, 6) * mask([7, 2, 6, 5], 7)[:, :, None], None, context=LABELS)


def test_two_samples_of_one_length_tell_no_order_of_others():
    for model in (Chosen(None), LongestFirst(None)):
        model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
        labels = torch.tensor([0, 1])
        for lengths in ([4, 4], [1, 4], [4, 1]):
            x, lengths = torch.randn(2, 7, 6, dtype=torch.float64), torch.tensor(lengths)
            y = model(x, lengths, context=labels)
            parts = [model(x[i : i + 1], lengths[i : i + 1], labels[i : i + 1]) for i in (0, 1)]
            torch.testing.assert_close(y, torch.cat(parts))


def test_samples_that_a_forward_sorts_by_their_padding_are_never_misread():
    class Sorted(Steps):
        def forward(self, x, beside):
            order = (x != 0).any(2).sum(1).argsort(descending=True)
            return self.norm(x[order].mean(1))[order.argsort()]

    model = apart(normswap.convert(Sorted(None).eval(), "cn", contexts=K, verify=False))
    try:
        model(torch.randn(N, 7, 6), None, context=LABELS)
    except ContextError:
        pass
    with pytest.raises(ContextError, match=r"exclude='norm'"):
        model(torch.randn(N, 7, 6) * mask([2, 7, 5, 6], 7)[:, :, None], None, context=LABELS)


def test_a_list_of_lengths_goes_with_the_samples_that_are_measured():
    model = normswap.convert(FORMS["list"][0].double().eval(), "cn", contexts=K, verify=False)
    x = torch.randn(8, 7, 6, dtype=torch.float64)
    labels = torch.arange(8) % K
    lengths = [7, 2, 6, 5, 1, 7, 7, 3]
    y = apart(model)(x, lengths, context=labels)
    one = [(x[i : i + 1], lengths[i : i + 1]) for i in range(8)]
    parts = [model(*part, context=labels[i : i + 1]) for i, part in enumerate(one)]
    torch.testing.assert_close(y, torch.cat(parts))


def test_what_no_order_follows_is_not_measured_again(monkeypatch):
    class Weighed(Steps):
        def forward(self, x, beside):
            return self.norm(x.flatten(0, 1)).view_as(x) * beside[:, None, None]

    measured, steps = [], Measurement.steps
    monkeypatch.setattr(
        Measurement, "steps", lambda m, brief: (brief or measured.append(m), steps(m, brief))[1]
    )
    model = normswap.convert(Weighed(None).eval(), "cn", contexts=K, verify=False)
    for value in range(4):
        model(torch.randn(N, 7, 6), torch.full((N,), value), context=LABELS)
    assert len(measured) == 1
