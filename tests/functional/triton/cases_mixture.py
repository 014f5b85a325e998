"""What the kernels of ACN compute, on a CPU by Triton's interpreter or on a GPU."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.functional.triton import mixture_norm
from tests.functional.triton.values import CASES, DEVICE, SHARE
from tests.support.builders import assert_close, make_batch, random_
from tests.support.mixture_oracle import acn
from tests.support.sampling import sampled
from tests.support.stat_maps import laid_out

ASSIGNMENTS = ("channel", "instance")
NAMES = ("weight", "bias", "prior_logits", "mu", "log_sigma")
RANGES = ((0.5, 1.5), (-1, 1), (-1, 1), (-1, 4), (-0.3, 0.7))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch, on_the_device):
    # Few programs, so that one has several tiles and several have a part in a sum.
    monkeypatch.setattr(mixture_norm, "_PROGRAMS", 2)
    mixture_norm._cut.cache_clear()
    yield
    mixture_norm._cut.cache_clear()


def make(shape=(3, 3, 4, 3), dtype=torch.float32, layout="contiguous"):
    pair = make_batch(shape, 0, 0.5, dtype), make_batch(shape, 1, 0.0, dtype)
    x, dy = (laid_out(t.to(DEVICE), layout) for t in pair)
    return x.requires_grad_(), dy


def make_acn(channels=3, components=4, dtype=torch.float32, **settings):
    layer = normswap.AdaptiveContextNorm(channels, components, dtype=dtype, **settings)
    for seed, (name, (low, high)) in enumerate(zip(NAMES, RANGES, strict=True)):
        random_(getattr(layer, name), seed, low, high)
    if layer.running_mean is not None:
        random_(layer.running_mean, 6, -1, 3)
        random_(layer.running_var, 7, 0.5, 2)
        layer.num_batches_tracked += 4
    return layer.to(DEVICE)


def compare(layer, x, dy, batch, share=None):
    """Hold a layer to a loop in float64: its output, gradients and running statistics."""
    tensors = (x, *(getattr(layer, name) for name in NAMES))
    wide = [t.detach().cpu().double().requires_grad_() for t in tensors]
    given, learned = None, layer.running_mean is None
    if learned:
        given = (wide[4], (2 * wide[5]).exp())
    elif not batch:
        given = (layer.running_mean.cpu().double(), layer.running_var.cpu().double())
    before = copy.deepcopy(layer).cpu()
    y = layer(x)
    expected, mean, var = acn(*wide, layer.options.assignment, given, 0.0 if learned else layer.eps)
    found = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    assert y.stride() == found[0].stride() == x.stride()
    share = share or SHARE[x.dtype]
    assert_close(y.cpu(), expected, share)
    wanted = torch.autograd.grad(expected, wide, dy.cpu().double())
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.cpu(), b, share)
    again = torch.autograd.grad(y, tensors, dy)
    assert all(map(torch.equal, found, again))
    if not learned:
        number = x.numel() // x.shape[1]
        count = before.num_batches_tracked + int(batch)
        rate = 0 if not batch else 1 / int(count) if layer.momentum is None else layer.momentum
        stored = max(torch.finfo(layer.mu.dtype).eps, 1e-6)
        for name, new in (("running_mean", mean), ("running_var", var * number / (number - 1))):
            old = getattr(before, name).double()
            assert_close(getattr(layer, name).cpu(), old + rate * (new - old), stored)
        assert int(layer.num_batches_tracked) == int(count)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize(("dtype", "layout"), CASES)
def test_acn_in_training(dtype, layout, assignment):
    x, dy = make((5, 3, 4, 3), dtype, layout)
    compare(make_acn(3, assignment=assignment), x, dy, batch=True)


INSTANCE, MEAN = {"assignment": "instance"}, {"momentum": None}
SIZES = [
    ((12, 5, 1, 1), "contiguous", 4, {}),
    ((12, 3, 1, 1), "channels_last", 2, INSTANCE),
    ((7, 2, 30, 41), "contiguous", 3, INSTANCE | MEAN),
    ((9, 5, 3), "contiguous", 32, INSTANCE),
    ((3, 5, 2, 3), "channels_last", 1, MEAN),
    ((3, 19, 5), "contiguous", 2, {}),
    ((2, 3, 3, 4, 5), "channels_last", 32, {}),
    ((1, 2, 30, 41), "channels_last", 4, MEAN),
]
OTHER = {"contiguous": "channels_last", "channels_last": "contiguous"}
LAID_OTHERWISE = [(s, OTHER[layout], *rest) for s, layout, *rest in SIZES if len(s) > 3]


@pytest.mark.parametrize(
    ("shape", "layout", "components", "settings"), sampled(SIZES + LAID_OTHERWISE, len(SIZES))
)
def test_acn_of_odd_sizes(shape, layout, components, settings):
    compare(make_acn(shape[1], components, **settings), *make(shape, layout=layout), batch=True)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("kind", ["eval", "frozen", "learned"])
def test_acn_with_given_statistics(kind, assignment):
    statistics = "learned" if kind == "learned" else "batch"
    layer = make_acn(statistics=statistics, assignment=assignment).train(kind != "eval")
    layer.frozen = kind == "frozen"
    x, dy = make(layout="channels_last")
    compare(layer, x, dy, batch=False)
    with torch.no_grad():
        unrecorded = layer(x)
    assert torch.equal(unrecorded, layer(x))


def test_a_component_that_owns_nothing_takes_its_running_statistics_and_leaves_them():
    layer = make_acn()
    with torch.no_grad():
        layer.mu[2] = 1e3
    (x, dy), before = make(), copy.deepcopy(layer)
    wide = copy.deepcopy(layer).double()
    y, expected = layer(x), wide(x.detach().double())
    assert_close(y, expected, 4e-6)
    assert_close(layer.running_mean, wide.running_mean, 1e-6)
    assert torch.equal(layer.running_var[2], before.running_var[2])
    found = torch.autograd.grad(y, [layer.mu, layer.weight], dy)
    for a, b in zip(found, torch.autograd.grad(expected, [wide.mu, wide.weight], dy), strict=True):
        assert_close(a, b, 4e-6)


def test_acn_keeps_its_digits_where_means_are_large():
    x, dy = make()
    x = (x.detach() + 5000).requires_grad_()
    layer = make_acn()
    with torch.no_grad():
        layer.mu += 5000
    # Means are stored in float32: a thousandth of a spread.
    compare(layer, x, dy, batch=True, share=2e-3)
    assert_close(make_after(layer, x).running_var, make_after(layer.double(), x).running_var, 1e-5)


def make_after(layer, x):
    """Return a copy after a batch that replaces its statistics."""
    layer = copy.deepcopy(layer)
    layer.momentum = 1.0
    layer(x.detach().to(layer.mu.dtype))
    return layer


def test_components_that_are_alike_are_batch_norm_however_far_values_are():
    layer = normswap.AdaptiveContextNorm(3, 4).to(DEVICE)
    x = make()[0].detach() * 1e4
    y, expected = layer(x), F.batch_norm(x, None, None, training=True)
    assert_close(y, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_may_have_another_dtype(dtype):
    compare(make_acn(dtype=dtype), *make(dtype=torch.bfloat16), batch=True)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("kind", ["batch", "eval", "learned"])
def test_a_graph_of_the_gradients_changes_none_of_them(kind, assignment):
    statistics = "learned" if kind == "learned" else "batch"
    layer = make_acn(3, 2, statistics=statistics, assignment=assignment)
    layer.train(kind != "eval")
    x, dy = make((2, 3, 3, 4))
    y, wanted = layer(x), [x, *layer.parameters()]
    expected = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    found = torch.autograd.grad(y, wanted, dy, create_graph=True)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)
    assert torch.autograd.grad(found[0].square().sum(), [x])[0].isfinite().all()


@pytest.mark.parametrize(("reentrant", "assignment"), [(True, "channel"), (False, "instance")])
def test_checkpointing_changes_nothing(reentrant, assignment):
    layer, (x, dy) = make_acn(3, assignment=assignment), make((2, 3, 3, 4))
    other = copy.deepcopy(layer)
    expected = torch.autograd.grad(layer(2 * x).relu_(), [x], dy)[0]
    checkpoint(lambda t: other(2 * t).relu_(), x, use_reentrant=reentrant).backward(dy)
    assert torch.equal(x.grad, expected)
    assert all(map(torch.equal, layer.buffers(), other.buffers()))


def test_many_components_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(mixture_norm, "norm_mixture", None)
    make_acn(2, 65)(make((2, 2, 2, 3))[0])
