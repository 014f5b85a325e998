"""What the kernels of CN compute, on a CPU by Triton's interpreter or on a GPU."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from normswap.functional.labels import Context
from normswap.methods import cn_layer
from tests.functional.triton.values import (
    EVERY_CASE,
    LABELS,
    PRIORS,
    as_labels,
    compare_cn,
    make,
    make_cn,
    make_weighing,
)
from tests.support.builders import assert_close
from tests.support.sampling import sampled

pytestmark = pytest.mark.usefixtures("on_the_device")


@EVERY_CASE
def test_cn_in_training(dtype, layout):
    layer = make_cn(3, 4, PRIORS, torch.float32)
    compare_cn(layer.train(), *make((7, 3, 5, 3), dtype, layout), LABELS)


@EVERY_CASE
def test_cn_whose_unlabelled_samples_weigh_the_contexts(dtype, layout):
    layer = make_weighing(3, 4, PRIORS, torch.float32).train()
    x, dy = make((7, 3, 5, 3), dtype, layout, offset=0.1)
    compare_cn(layer, x, dy, LABELS, unknown="posterior")


SOME, ALL, NONE = [2, -1, 1, 1, -1], [-1] * 5, [0, 2, 0, 1, 1]
WEIGHED = [(1, True, SOME), (3, True, SOME), (64, True, SOME), (3, True, ALL), (3, True, NONE)]
WEIGHED += [(1, False, ALL), (3, False, NONE), (64, False, ALL)]
OTHERS = [(64, True, NONE), (64, False, SOME)]


@pytest.mark.parametrize(
    ("contexts", "training", "labels"), sampled(WEIGHED + OTHERS, len(WEIGHED))
)
def test_some_all_and_no_samples_weigh_the_contexts(contexts, training, labels):
    layer = make_weighing(3, contexts, None, torch.float32).train(training)
    labels, (x, dy) = [min(label, contexts - 1) for label in labels], make((5, 3, 4, 2), offset=0.1)
    unseen = Context(as_labels(labels), None)
    compare_cn(layer, x, dy, labels, given=unseen, training=training, unknown="posterior")


def test_weights_keep_the_digits_where_means_are_large():
    layer = make_weighing(3, 3, None, torch.float32).train()
    layer.running_mean += 500
    x, dy = make((5, 3, 4, 2), offset=0.1)
    x = (x.detach() + 500).requires_grad_()
    compare_cn(layer, x, dy, [2, -1, 1, 1, -1], 5e-5, unknown="posterior")


@pytest.mark.parametrize(
    ("shape", "layout", "contexts", "settings"),
    [
        ((6, 4, 1, 1), "contiguous", 4, {}),  # contexts of one value
        ((6, 4, 1, 1), "channels_last", 4, {}),
        ((5, 3, 7), "contiguous", 1, {"momentum": None}),
        ((3, 2, 3, 4, 5), "contiguous", 4, {"unknown": 2}),
        ((3, 2, 3, 4, 5), "channels_last", 4, {"unknown": 2}),
    ],
)
def test_cn_of_odd_sizes(shape, layout, contexts, settings):
    layer = make_cn(shape[1], contexts, None, torch.float32, **settings).train()
    labels = [min(label, contexts - 1) for label in LABELS[: shape[0]]]
    settings = {"unknown": layer.unknown}
    x, dy = make(shape, layout=layout)
    compare_cn(layer, x, dy, labels, **settings)
    compare_cn(layer, x, dy, labels, **settings)  # from other running statistics


@pytest.mark.parametrize(
    "settings",
    [{"affine": "shared"}, {"affine": "shared", "unknown": "posterior"}, {"shrink": 2.0}],
)
@pytest.mark.parametrize("training", [True, False])
def test_settings_of_cn(settings, training):
    layer = make_cn(3, 4, PRIORS, torch.float32, **settings).train(training)
    how = {"unknown": layer.unknown, "training": training, "shrink": layer.shrink}
    compare_cn(layer, *make(), LABELS, **how)


@pytest.mark.parametrize("contexts", sampled([1, 130, 1024], 2))
def test_one_context_and_more_than_a_step_takes(contexts):
    layer = make_cn(1, contexts, None, torch.float32).train()
    labels = [min(label, contexts - 1) for label in (1023, 5, 1023, 0)]
    compare_cn(layer, *make((4, 1, 4, 2)), labels)


def test_cn_keeps_the_digits_of_spreads_where_means_are_large():
    layer = make_cn(3, 2, None, torch.float32).train()
    # What a mean of 500 loses by rounding moves the output by so much, as torch's norms do.
    compare_cn(layer, *make((6, 3, 5, 5), offset=500.0), [0, 1, 1, 0, 1, 0], 5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_may_have_another_dtype(dtype):
    layer = make_cn(3, 4, PRIORS, dtype).train()
    x, dy = make(dtype=torch.bfloat16)
    compare_cn(layer, x, dy, LABELS)


KNOWN = [0, 1, 1, 3, 0, 0, 2]


@pytest.mark.parametrize(
    ("maker", "mode", "labels"),
    [
        *((make_cn, "eval", LABELS), (make_cn, "eval", None), (make_cn, "frozen", KNOWN)),
        *((make_cn, "frozen", LABELS), (make_weighing, "eval", LABELS)),
        *((make_weighing, "eval", KNOWN), (make_weighing, "eval", None)),
        *((make_weighing, "frozen", LABELS), (make_weighing, "frozen", None)),
    ],
)
def test_cn_with_running_statistics(maker, mode, labels):
    layer = maker(3, 4, PRIORS, torch.float32).train(mode == "frozen")
    if mode == "frozen":
        layer.stats_frozen = True
        labels = labels or [1] * 7
    x, dy = make()
    compare_cn(layer, x, dy, labels, training=False, unknown=layer.unknown)
    with torch.no_grad():
        given = as_labels(labels)
        assert torch.equal(layer(x, given), layer(x.requires_grad_(), given))


def test_statistics_of_all_processes_are_moved_as_those_of_one(monkeypatch):
    layer = make_cn(3, 4, PRIORS, torch.float32).train()
    other, labels, (x, dy) = copy.deepcopy(layer), as_labels(LABELS), make()
    expected = torch.autograd.grad(layer(x, labels), [x], dy)[0]
    monkeypatch.setattr(cn_layer, "sum_over_ddp", lambda: lambda t: t)
    assert torch.equal(torch.autograd.grad(other(x, labels), [x], dy)[0], expected)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert_close(a, b, 1e-6)


WRAPPED = [(make_cn, True), (make_weighing, False), (make_cn, False), (make_weighing, True)]


@pytest.mark.parametrize(("maker", "reentrant"), sampled(WRAPPED, 2))
def test_checkpointing_changes_nothing(maker, reentrant):
    layer = maker(3, 4, PRIORS, torch.float32).train()
    other, labels, (x, dy) = copy.deepcopy(layer), as_labels(LABELS), make()
    # A product before it: what is computed again is another x.
    expected = torch.autograd.grad(layer(2 * x, labels).relu_(), [x], dy)[0]
    y = checkpoint(lambda t: other(2 * t, labels).relu_(), x, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(x.grad, expected)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
