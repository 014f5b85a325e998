"""What the kernels of SelfNorm and CrossNorm compute, by Triton's interpreter or on a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.functional.style import cross_norm
from normswap.functional.triton import plan
from tests.functional.test_style import oracle_cross_norm
from tests.functional.triton.values import CASES, DEVICE, EVERY_CASE, SHARE
from tests.methods.test_selfnorm import oracle_selfnorm
from tests.support.builders import assert_close, make_batch, random_
from tests.support.sampling import sampled
from tests.support.stat_maps import laid_out

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture
def in_parts(monkeypatch):
    """Cut small maps as large ones are."""
    monkeypatch.setattr(plan, "_TILE", 8)
    monkeypatch.setattr(plan, "_WIDTH", 2)
    plan.plan_of.cache_clear()
    yield
    plan.plan_of.cache_clear()


def make(shape=(4, 3, 3, 2), dtype=torch.float32, layout="contiguous"):
    pair = make_batch(shape, 0, 0.5, dtype), make_batch(shape, 1, 0.0, dtype)
    x, dy = (laid_out(t.to(DEVICE), layout) for t in pair)
    return x.requires_grad_(), dy


def make_gate(channels=3, init="paper", dtype=torch.float32):
    layer = normswap.SelfNorm(channels, 1, init, dtype=dtype)
    for seed, tensor in enumerate(layer.state_dict().values()):
        random_(tensor, seed, 0.5, 1.5)
    return layer.to(DEVICE)


def compare_gate(layer, x, dy, batch):
    state = {name: t.detach().cpu().double() for name, t in layer.state_dict().items()}
    names = [name for name, _ in layer.named_parameters()]
    wide = [t.requires_grad_() for t in (x.detach().cpu().double(), *(state[n] for n in names))]
    y = layer(x)
    expected, running = oracle_selfnorm(wide[0], state, 1, layer.g.scale, batch)
    found = torch.autograd.grad(y, (x, *layer.parameters()), dy, retain_graph=True)
    wanted = torch.autograd.grad(expected, wide, dy.cpu().double())
    assert y.stride() == found[0].stride() == x.stride()
    assert_close(y.cpu(), expected, SHARE[x.dtype])
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.cpu(), b, max(SHARE[x.dtype], torch.finfo(a.dtype).eps))
    stored = max(torch.finfo(layer.g.running_mean.dtype).eps, 1e-6)
    assert_close(layer.g.running_mean.cpu(), running[0], stored)
    assert_close(layer.g.running_var.cpu(), running[1], stored)
    again = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    assert all(map(torch.equal, found, again))


@EVERY_CASE
def test_selfnorm_in_training(dtype, layout):
    compare_gate(make_gate(), *make(dtype=dtype, layout=layout), batch=True)


@pytest.mark.parametrize("layout", sampled(["channels_last", "contiguous"], 1))
def test_selfnorm_of_several_parts_and_many_instances(layout, in_parts):
    x, dy = make((18, 2, 3, 3), layout=layout)
    assert plan.plan(x).splits > 1
    compare_gate(make_gate(2), x, dy, batch=True)


@pytest.mark.parametrize(
    ("shape", "mode"), [((4, 9, 1, 1), "train"), ((1, 3, 5), "train"), ((4, 3, 2, 2, 2), "eval")]
)
def test_selfnorm_of_odd_sizes(shape, mode):
    layer = make_gate(shape[1], "identity", torch.bfloat16 if mode == "eval" else torch.float32)
    compare_gate(layer.train(mode == "train"), *make(shape), batch=shape[0] > 1 and mode == "train")


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_of_the_gradients_changes_none_of_them(training):
    layer, (x, dy) = make_gate().train(training), make()
    y, wanted = layer(x), [x, *layer.parameters()]
    expected = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    for a, b in zip(torch.autograd.grad(y, wanted, dy, create_graph=True), expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize(("reentrant", "training"), [(True, True), (False, True), (False, False)])
def test_checkpointing_changes_nothing(reentrant, training):
    layer, other, (x, dy) = make_gate().train(training), make_gate().train(training), make()
    expected = torch.autograd.grad(layer(2 * x).relu_(), [x], dy)[0]
    y = checkpoint(lambda t: other(2 * t).relu_(), x, use_reentrant=reentrant)
    if not training:
        with torch.no_grad():
            other.g.running_mean += 1  # as a forward in training would, between this and backward
    y.backward(dy)
    assert torch.equal(x.grad, expected)
    if training:
        assert all(map(torch.equal, layer.buffers(), other.buffers()))


@pytest.mark.parametrize(
    ("dtype", "layout", "instances"), [(*case, 1 + i % 2) for i, case in enumerate(CASES)]
)
def test_crossnorm(dtype, layout, instances, in_parts):
    x, dy = make((3, 3, 4, 3), dtype, layout)
    permutation = torch.tensor([2, 0, 1], device=DEVICE)
    wide = x.detach().cpu().double().requires_grad_()
    y, expected = (
        cross_norm(x, permutation, instances),
        oracle_cross_norm(wide, permutation, instances),
    )
    assert_close(y.cpu(), expected, SHARE[dtype])
    (found,) = torch.autograd.grad(y, [x], dy, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, [wide], dy.cpu().double())
    assert y.stride() == found.stride() == x.stride()
    assert_close(found.cpu(), wanted, SHARE[dtype])
    (again,) = torch.autograd.grad(y, [x], dy, retain_graph=True)
    assert torch.equal(found, again)
    (graphed,) = torch.autograd.grad(y, [x], dy, create_graph=True)
    assert_close(graphed.cpu(), wanted, SHARE[dtype])
    with torch.no_grad():
        assert torch.equal(cross_norm(x, permutation, instances), y)


@pytest.mark.parametrize("view", [lambda x: x[..., ::2], lambda x: x[:, :, 0].transpose(1, 2)])
def test_crossnorm_of_a_view(view):
    x = view(make((3, 4, 5, 6))[0].detach()).requires_grad_()
    permutation = torch.tensor([2, 0, 1], device=DEVICE)
    wide = x.detach().cpu().double().requires_grad_()
    y, expected = cross_norm(x, permutation), oracle_cross_norm(wide, permutation, 2)
    assert_close(y.cpu(), expected, SHARE[torch.float32])
    (found,) = torch.autograd.grad(y.sum(), [x])
    (wanted,) = torch.autograd.grad(expected.sum(), [wide])
    assert float((found.cpu() - wanted).abs().max()) < 1e-5
