"""Samples are told apart in inputs of every form."""

import threading

import numpy
import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError
from tests.support.rows import LABELS, ORDERS, K, N, Rows, apart, rows_of, singly


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


class Holding:
    """Copies its tensor itself, as some containers of tensors do."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, memo):
        return Holding(self.x.clone())


UNCOPYABLE = {
    "generator": lambda x: (row for row in x),
    "lock beside": lambda x: {"x": x, "lock": threading.Lock()},
    "own copies": Holding,
}


@pytest.mark.parametrize("given", UNCOPYABLE.values(), ids=UNCOPYABLE)
def test_an_argument_that_cannot_be_copied_is_not_measured(given):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, parts):
            rows = parts["x"] if isinstance(parts, dict) else getattr(parts, "x", parts)
            return self.norm(torch.stack(list(rows)))

    model = apart(normswap.convert(Reading().double().eval(), "cn", contexts=K, verify=False))
    x = torch.randn(N, 6, dtype=torch.float64)
    y = model(given(x), context=LABELS)
    parts = [model(given(x[i : i + 1]), context=LABELS[i : i + 1]) for i in range(N)]
    torch.testing.assert_close(y, torch.cat(parts))
    assert "cannot be copied, TypeError" in rows_of(model)["norm"]


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


def as_arguments(model, inputs, context):
    return model(*inputs, context=context)


def as_a_list(model, inputs, context):
    return model(list(inputs), context=context)


def joined(s, *xs):
    return s.norm(torch.cat(xs)).unflatten(0, (len(xs), -1)).sum(0)


INPUTS = {
    "two": lambda s, a, b: joined(s, a, b),
    "any": joined,
    "a list": lambda s, xs: joined(s, *xs),
    "a list, one by one": lambda s, xs: sum(s.norm(x) for x in xs),
}


@pytest.mark.parametrize("forward", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_as_many_inputs_as_samples_are_no_samples(forward, shape):
    call = as_a_list if forward.__code__.co_varnames[1] == "xs" else as_arguments
    call = as_arguments if forward is joined else call
    model = type("Several", (nn.Module,), {"forward": forward})()
    model.norm = nn.BatchNorm1d(6)
    model = apart(normswap.convert(model.double().eval(), "cn", contexts=K, verify=False))
    inputs = torch.randn(2, 2, *shape, dtype=torch.float64)
    y = call(model, inputs, LABELS[:2])
    parts = [call(model, inputs[:, i : i + 1], LABELS[i : i + 1]) for i in range(2)]
    assert torch.allclose(y, torch.cat(parts))


@pytest.mark.parametrize("at_once", [True, False])
def test_as_many_images_as_channels_are_samples(at_once):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            if at_once:
                return self.norm(torch.stack(images))
            return torch.cat([self.norm(image[None]) for image in images])

    model = apart(normswap.convert(Images().double().eval(), "cn", contexts=K, verify=False))
    images = [*torch.randn(3, 3, 5, 5, dtype=torch.float64)]
    y = model(images, context=LABELS[:3])
    parts = [model([image], context=LABELS[i : i + 1]) for i, image in enumerate(images)]
    assert torch.allclose(y, torch.cat(parts))


@pytest.mark.parametrize("order", ["as they are", "flipped", "pairs"])
@pytest.mark.parametrize("form", ["an array", "a list of arrays", "a tuple of arrays"])
def test_arrays_of_numpy_are_samples(form, order):
    class Arrays(Rows):
        def forward(self, x):
            return super().forward(torch.stack([torch.from_numpy(row) for row in x]))

    model = apart(normswap.convert(Arrays(ORDERS[order]).double().eval(), "cn", contexts=K))
    x = numpy.random.default_rng(0).normal(size=(N, 6))
    given = {"an array": x, "a list of arrays": [*x], "a tuple of arrays": (*x,)}[form]
    for count in (N, 2):
        y = model(given[:count], context=LABELS[:count])
        assert torch.allclose(y, singly(model, given[:count], LABELS[:count]))


def test_arrays_of_numpy_that_their_values_sort_are_an_error():
    class Sorting(Rows):
        def forward(self, rows):
            return super().forward(torch.stack([*map(torch.from_numpy, sorted(rows, key=sum))]))

    model = Sorting(ORDERS["as they are"]).double().eval()
    model = apart(normswap.convert(model, "cn", contexts=K, verify=False))
    with pytest.raises(ContextError, match="each row of the input of norm to be of one sample"):
        model([*numpy.random.default_rng(0).normal(size=(N, 6))], context=LABELS)


class Flipped(nn.Module):
    """Norms images of any dtype, or the mean of what a table holds of tokens, the last first."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.table = nn.Embedding(5, 6)

    def forward(self, x):
        tokens = x.dtype == torch.int64
        x = self.table(x).mean(1) if tokens else x.double()
        return self.norm(x.flip(0)).flip(0)


def flipped():
    return apart(normswap.convert(Flipped().double().eval(), "cn", contexts=K, verify=False))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("first", [torch.zeros, torch.ones])
def test_black_images_and_empty_masks_tell_the_order_of_others(dtype, first):
    model = flipped()
    for x in (first(N, 6, dtype=dtype), (torch.randn(N, 6) > 0).to(dtype)):
        torch.testing.assert_close(model(x, context=LABELS), singly(model, x))
    assert rows_of(model) == {"norm": "permuted"}


def test_tokens_that_are_all_alike_tell_nothing_of_other_batches():
    model = flipped()
    model(torch.zeros(N, 3, dtype=torch.int64), context=LABELS)
    assert rows_of(model) == {"norm": "not measured: its samples are all alike"}
    x = torch.randint(5, (N, 3))
    torch.testing.assert_close(model(x, context=LABELS), singly(model, x))
