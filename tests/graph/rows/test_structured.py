"""Samples that a forward takes as a list of what holds each, and what goes with them."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError
from normswap.graph.rows.measure import Measurement
from tests.support.rows import K, apart, rows_of

N = 6
LABELS = torch.tensor([2, 0, 1, 0, 1, 1])


@dataclass
class Image:
    pixels: torch.Tensor


# How a list holds a sample, and how the forward gets at it.
HOLDERS = {
    "dict": (lambda x: {"image": x, "height": 3}, lambda v: v["image"]),
    "tuple": (lambda x: (x, torch.tensor(1)), lambda v: v[0]),
    "tuple of parts": (lambda x: (x[:2], x[2:]), torch.cat),
    "dataclass": (Image, lambda v: v.pixels),
    "object": (lambda x: SimpleNamespace(x=x), lambda v: v.x),
    "list of numbers": (lambda x: x.tolist(), lambda v: torch.tensor(v, dtype=torch.float64)),
    "array": (lambda x: [x.numpy()], lambda v: torch.from_numpy(v[0])),
}


class Flipping(nn.Module):
    """Norms the samples of a list, the last first."""

    def __init__(self, get):
        super().__init__()
        self.get = get
        self.norm = nn.BatchNorm1d(6)

    def forward(self, samples):
        return self.norm(torch.stack([self.get(sample) for sample in samples]).flip(0))


@pytest.mark.parametrize("sequence", [list, tuple])
@pytest.mark.parametrize(("hold", "get"), HOLDERS.values(), ids=HOLDERS)
def test_samples_in_a_list_of_what_holds_them_are_told_apart(hold, get, sequence):
    model = Flipping(get).double().eval()
    model = apart(normswap.convert(model, "cn", contexts=K, verify=False))
    x = torch.randn(N, 6, dtype=torch.float64)
    y = model(sequence(map(hold, x)), context=LABELS)
    parts = [model([hold(x[i])], context=LABELS[i : i + 1]) for i in range(N)]
    torch.testing.assert_close(y, torch.cat(parts).flip(0))
    assert rows_of(model) == {"norm": "permuted"}


class Captioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, captions):
        weights = [len(caption) for caption, _ in zip(captions, x, strict=True)]
        return self.norm(x) * torch.tensor(weights, dtype=x.dtype)[:, None]


def test_other_captions_are_not_measured_anew(monkeypatch):
    measured, steps = [], Measurement.steps
    monkeypatch.setattr(
        Measurement, "steps", lambda m, brief: (brief or measured.append(m), steps(m, brief))[1]
    )
    model = apart(normswap.convert(Captioned().double().eval(), "cn", contexts=K, verify=False))
    for turn in range(4):
        x = torch.randn(N, 6, dtype=torch.float64)
        captions = [f"picture {turn} {i * '!'}" for i in range(N)]
        y = model(x, captions, context=LABELS)
        one = [(x[i : i + 1], captions[i : i + 1]) for i in range(N)]
        parts = [model(*part, context=LABELS[i : i + 1]) for i, part in enumerate(one)]
        torch.testing.assert_close(y, torch.cat(parts))
    assert len(measured) == 1


def test_a_list_of_images_of_three_channels_is_not_taken_for_three_samples():
    model = normswap.convert(Flipping(lambda v: v).eval(), "cn", contexts=K, verify=False)
    with pytest.raises(ContextError, match=r"with 3 or 6 labels.*got 5"):
        model([*torch.randn(N, 3, 6)], context=LABELS[:5])


class Ragged(nn.Module):
    """Norms the steps of sequences of several lengths in a nested tensor."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(torch.cat(x.unbind()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_samples(layout):
    model = apart(normswap.convert(Ragged().double().eval(), "cn", contexts=K, verify=False))
    for lengths in ([3, 3, 3, 3, 3, 3], [1, 4, 2, 5, 3, 3]):
        steps = [torch.randn(length, 6, dtype=torch.float64) for length in lengths]
        y = model(torch.nested.nested_tensor(steps, layout=layout), context=LABELS)
        parts = [
            model.norm(x, context=[label] * len(x))
            for x, label in zip(steps, LABELS.tolist(), strict=True)
        ]
        torch.testing.assert_close(y, torch.cat(parts))


class Reading(nn.Module):
    """Norms a vector of each text, in an order of its own."""

    def __init__(self, order):
        super().__init__()
        self.letters = nn.Embedding(128, 6)
        self.norm = nn.BatchNorm1d(6)
        self.order = order

    def forward(self, texts):
        order = self.order(texts)
        vectors = [self.letters(torch.tensor([*map(ord, texts[i])])).mean(0) for i in order]
        y = self.norm(torch.stack(vectors))
        return torch.empty_like(y).index_copy(0, torch.tensor(order), y)


def read(order):
    return apart(normswap.convert(Reading(order).double().eval(), "cn", contexts=K, verify=False))


TEXTS = [["aa", "bc", "ca", "db"], ["hello", "b", "cdd", "abcd"], ["a", "bb", "ccc", "abcd"]]


@pytest.mark.parametrize("order", [iter, reversed], ids=["as they come", "the last first"])
def test_texts_are_samples(order):
    model = read(lambda texts: [*order(range(len(texts)))])
    for texts in TEXTS:
        labels = LABELS[: len(texts)]
        single = [model([t], context=labels[i : i + 1]) for i, t in enumerate(texts)]
        torch.testing.assert_close(model(texts, context=labels), torch.cat(single))


def test_texts_that_are_sorted_are_refused():
    model = read(lambda texts: sorted(range(len(texts)), key=lambda i: len(texts[i])))
    with pytest.raises(ContextError, match="order depends on their values"):
        model(TEXTS[1], context=LABELS[:4])
