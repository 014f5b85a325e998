"""Labels in every accepted form mean the same; every bad one says what, where and how to fix it."""

import re

import numpy
import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError, MissingContextError, UnknownNameError
from normswap.functional import kernels
from tests.support.builders import make_batch, make_cn, make_cnx, trained_norm

NAMES = ("photo", "art", "sketch")
EXPECTED = torch.tensor([2, 0, -1, 1])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = trained_norm()

    def forward(self, x):
        return self.bn(x).relu()


def make_model(method="cn", **settings):
    model = normswap.convert(Net().eval(), method, contexts=NAMES, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.bn.state_dict().values():
            if tensor.dim() == 2:
                tensor.add_(torch.rand(tensor.shape, generator=generator))
    return model


def images(n=4):
    return make_batch((n, 4, 3, 5)).float()


@pytest.mark.parametrize(
    "labels",
    [
        EXPECTED.int(),
        EXPECTED.to(torch.int8),
        EXPECTED.tolist(),
        tuple(EXPECTED.tolist()),
        EXPECTED.numpy(),
        list(EXPECTED.numpy()),
        list(EXPECTED),
        ["sketch", "photo", None, "art"],
        [2, "photo", None, 1],
        numpy.array(["sketch", "photo", None, "art"], dtype=object),
    ],
    ids=lambda labels: f"{type(labels).__name__} of {type(labels[0]).__name__}",
)
def test_forms_of_mixed_labels(labels):
    model, x = make_model(), images()
    assert torch.equal(model(x, context=labels), model(x, context=EXPECTED))


def test_array_of_names():
    model, x = make_model(), images()
    labels = numpy.array(["sketch", "photo", "photo", "art"])
    assert torch.equal(model(x, context=labels), model(x, context=torch.tensor([2, 0, 0, 1])))


class Column:
    """An array of another library, as a column of a table."""

    def __array__(self, dtype=None, copy=None):
        return EXPECTED.numpy()


@pytest.mark.parametrize("labels", [Column(), EXPECTED.numpy().astype(">i8")], ids=["own", "order"])
def test_arrays_of_any_library_and_byte_order(labels):
    model, x = make_model(), images()
    assert torch.equal(model(x, context=labels), model(x, context=EXPECTED))


@pytest.mark.parametrize("labels", [{0, 1, 2, -1}, dict.fromkeys([0, 1, 2, -1])])
def test_labels_without_an_order_are_refused(labels):
    with pytest.raises(ContextError, match=r"a sequence of them, got (set|dict)"):
        make_model()(images(), context=labels)


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_no_labels(method, training):
    model, x = make_model(method).train(training), images(0)
    assert model(x, context=EXPECTED[:0]).shape == x.shape
    assert model(x, context=[]).shape == x.shape


@pytest.mark.parametrize("labels", [1, "art", torch.tensor(1), numpy.int64(1), ["art"] * 4])
@pytest.mark.parametrize("samples", [4, 1])
def test_one_label_for_the_whole_batch(labels, samples):
    model, x = make_model(), images(samples)
    if isinstance(labels, list):
        labels = labels[:samples]
    expected = model(x, context=torch.full((samples,), 1))
    assert torch.equal(model(x, context=labels), expected)


@pytest.mark.parametrize("labels", [None, -1, torch.tensor(-1), [None] * 4, torch.full((4,), -1)])
def test_forms_of_all_unknown(labels):
    model, x = make_model(), images()
    assert torch.equal(model(x, context=labels), model(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [make_cn, make_cnx])
def test_samples_of_one_context_give_what_they_give_beside_others(make, layout):
    layer = make().eval()
    x = make_batch((5, 4, 3, 5)).contiguous(memory_format=layout).requires_grad_()
    tensors = [x, *layer.parameters()]
    beside = layer(x, torch.tensor([2, 2, 2, 0, 1]))[:3]
    alone = layer(x[:3], 2)
    assert torch.allclose(alone, beside, rtol=0, atol=1e-12)
    cotangent = make_batch(alone.shape, seed=4)
    expected = torch.autograd.grad(beside, tensors, cotangent)
    for a, b in zip(torch.autograd.grad(alone, tensors, cotangent), expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [make_cn, make_cnx])
def test_one_context_for_a_batch_has_one_row_of_tables_where_mixed_labels_have_one_each(
    make, monkeypatch
):
    rows, affine = [], kernels.affine

    def record(x, scale, offset):
        rows.append(len(scale))
        return affine(x, scale, offset)

    monkeypatch.setattr(kernels, "affine", record)
    layer, x = make().eval(), make_batch((4, 4, 3, 5))
    layer(x, "2"), layer(x, torch.tensor([2, 0, 1, 1]))
    assert rows == [1, 4]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labels", [torch.ones(4, dtype=torch.int64), torch.tensor([1]).expand(4)])
@pytest.mark.parametrize("make", [make_cn, make_cnx])
def test_a_trace_from_labels_alike_takes_others(make, labels):
    layer, x = make().eval(), make_batch((4, 4, 3, 5))
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x, labels))
    mixed = torch.tensor([2, 0, 1, 1])
    assert torch.allclose(traced(x, mixed), layer(x, mixed), rtol=0, atol=1e-12)


def test_labels_written_over_within_a_scope_are_those_that_count():
    model, x, labels = make_model(), images(), torch.zeros(4, dtype=torch.int64)
    with normswap.use_context(model, labels):
        labels.copy_(torch.tensor([2, 0, 1, 1]))
        y = model(x)
    assert torch.equal(y, model(x, context=torch.tensor([2, 0, 1, 1])))


def test_labels_written_over_before_backward_count_as_they_were():
    labels, model, grads = torch.tensor([2, 0, 1, 1]), make_model().double().train(), []
    for later in (labels, torch.zeros(4, dtype=torch.int64)):
        given, x = labels.clone(), make_batch((4, 4, 3, 5)).requires_grad_()
        y = model(x, context=given)
        given.copy_(later)
        y.backward(make_batch(y.shape, seed=4))
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_policy_that_names_a_context(method, index):
    model, x = make_model(method, unknown=NAMES[index]), images()
    expected = model(x, context=torch.full((4,), index))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-6)


def test_unlabelled_samples_do_not_disturb_the_others():
    model, x = make_model(), images()
    alone = [model(x[n : n + 1], context=EXPECTED[n : n + 1]) for n in range(4)]
    assert torch.allclose(model(x, context=EXPECTED), torch.cat(alone), rtol=0, atol=1e-6)


BAD = [
    (torch.tensor([0, 1, 2, 3]), r"labels in \[0, 3\), or -1 .* from 0 to 3; .* photo, art, sket"),
    (torch.tensor([0, -2, 2, 1]), r"labels in \[0, 3\), or -1 .* got values from -2 to 2"),
    (7, r"labels in \[0, 3\), or -1 .* got values from 7 to 7"),
    ([0, 1, 2, 3], r"labels in \[0, 3\), or -1 .* from 0 to 3"),
    (torch.zeros(4), r"integer dtype \(int64\), got torch.float32; .* call \.long\(\)"),
    (torch.zeros(4, dtype=torch.float16), "integer dtype .* got torch.float16"),
    (torch.zeros(4, dtype=torch.bool), "integer dtype .* got torch.bool"),
    (torch.zeros(4, dtype=torch.complex64), "integer dtype .* got torch.complex64"),
    (numpy.zeros(4), "integer dtype .* got torch.float64"),
    (torch.zeros(4, 1, dtype=torch.int64), r"shape \(N,\), one label per sample, got \(4, 1\)"),
    (torch.zeros(4, 3, dtype=torch.int64), r"shape \(N,\), one label per sample, got \(4, 3\)"),
    ([0, 1.5, 2, 1], r"names, indices or None, got 1\.5 \(float\)"),
    ([0, True, 2, 1], r"names, indices or None, got True \(bool\)"),
    (True, "integer dtype .* got torch.bool"),
    (1.0, "integer tensor .* a name, an index, or a sequence .* got float"),
    (object(), "integer tensor .* a name, an index, or a sequence .* got object"),
]


def named(value):
    if isinstance(value, str):
        return "match"
    shown = "an object" if type(value) is object else repr(value)  # its repr has an address
    return re.sub(r"\W+", "_", shown)[:40]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("labels", "match"), BAD, ids=named)
def test_bad_labels_of_a_model(labels, match, training):
    with pytest.raises(ContextError, match=match):
        make_model().train(training)(images(), context=labels)


@pytest.mark.parametrize(("labels", "match"), BAD, ids=named)
@pytest.mark.parametrize("make", [make_cn, make_cnx])
def test_bad_labels_of_a_layer(make, labels, match):
    layer = make()
    layer.names = NAMES
    with pytest.raises(ContextError, match=match):
        layer(make_batch((4, 4, 3)), labels)


@pytest.mark.parametrize("count", [0, 2, 3, 5, 8])
def test_wrong_number_of_labels(count):
    labels = torch.zeros(count, dtype=torch.int64)
    with pytest.raises(
        ContextError,
        match=rf"with 4 labels, one per sample, got {count} \(first norm: bn\); "
        r"pass context= or use normswap\.use_context",
    ):
        make_model()(images(), context=labels)


@pytest.mark.parametrize("labels", ["cartoon", ["photo", "cartoon", "art", None]])
def test_unknown_name_lists_the_names(labels):
    with pytest.raises(UnknownNameError, match=r"unknown context 'cartoon'.* photo, art, sketch"):
        make_model()(images(), context=labels)


def test_no_labels_in_training():
    with pytest.raises(
        MissingContextError,
        match=r"in training mode, got none \(at bn; contexts: photo, art, sketch\); pass context= "
        r".*normswap\.use_context",
    ):
        make_model().train()(images())


def test_labels_partly_unknown_in_training_are_accepted():
    y = make_model().train()(images(), context=["art", None, "photo", "art"])
    assert y.isfinite().all()


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_policy_error_without_labels(method):
    with pytest.raises(MissingContextError, match=r"with unknown='error', got none \(at bn"):
        make_model(method, unknown="error")(images())


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("labels", [[0, None, 1, 2], torch.tensor([0, -1, 1, 2]), -1])
def test_policy_error_with_an_unknown_label(method, labels):
    with pytest.raises(
        MissingContextError, match=r"for every sample with unknown='error', got -1 \(at bn\)"
    ):
        make_model(method, unknown="error")(images(), context=labels)


def test_policy_error_with_every_label_known():
    x, labels = images(), torch.tensor([2, 0, 0, 1])
    y = make_model(unknown="error")(x, context=labels)
    assert torch.equal(y, make_model()(x, context=labels))


def test_a_refused_batch_changes_no_statistics():
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ContextError):
        model(images(), context=[0, 1, 2, 3])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 3, 4), (4,)])
def test_input_with_channels_elsewhere_is_refused(shape):
    with pytest.raises(ContextError, match=r"expected input \(N, 4, \*\) at ContextNorm, got"):
        make_cn()(torch.zeros(shape), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("unknown", ["nearest", -1, 3, None])
def test_policy_of_a_layer_that_does_not_exist(unknown):
    with pytest.raises(ContextError, match=r"error, pooled, posterior or the index .* \[0, 3\)"):
        make_cn(unknown=unknown)
