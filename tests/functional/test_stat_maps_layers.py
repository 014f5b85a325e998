"""The fused layers: derivatives of all kinds, and memory."""

import copy

import pytest
import torch
from torch.autograd import forward_ad

import normswap
from tests.support.acn import make_acn
from tests.support.builders import (
    assert_close,
    make_batch,
    make_cn,
    make_cnx,
    make_instance,
)
from tests.support.sampling import sampled
from tests.support.stat_maps import LABELS, laid_out


def make_layers(channels=4):
    """Return every layer of the fused kind with the arguments of its forward, in training."""
    labels, partly = torch.tensor(LABELS), torch.tensor([2, -1, 2, 1, -1])
    one, two = (normswap.SelfNorm(channels, n, "paper", dtype=torch.float64) for n in (1, 2))
    return {
        "cn": (make_cn(channels), (labels,)),
        "cn, some unlabelled": (make_cn(channels), (partly,)),
        "cn, posterior": (make_cn(channels, unknown="posterior"), (partly,)),
        "cn-x": (make_cnx(channels), (labels,)),
        "cn-x, some unlabelled": (make_cnx(channels), (partly,)),
        "instance": (make_instance(channels), (labels,)),
        "acn, by instance": (make_acn(channels, assignment="instance"), ()),
        "acn, learned": (make_acn(channels, assignment="instance", statistics="learned"), ()),
        "selfnorm": (one, ()),
        "selfnorm, two gates": (two, ()),
        "crossnorm": (normswap.CrossNorm(p=1.0), ()),
        "crossnorm, style box": (normswap.CrossNorm("style", p=1.0), ()),
        "crossnorm, two boxes": (normswap.CrossNorm("both", p=1.0), ()),
        "crossnorm, channels": (normswap.CrossNorm(instances=1, p=1.0), ()),
    }


EVERY_LAYER = pytest.mark.parametrize("kind", make_layers())


def runner(kind, channels=4):
    """Return a function of x and the parameters that changes nothing between calls."""
    layer, arguments = make_layers(channels)[kind]
    layer.train()
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        torch.manual_seed(1)
        state = {name: value.clone() for name, value in buffers.items()}
        state |= dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x, *arguments))

    return run, tuple(p.detach().requires_grad_() for p in layer.parameters())


# Channels last meets each kernel with one of the kinds that share it.
LAST = ("cn", "cn, posterior", "cn-x, some unlabelled", "instance", "acn, by instance")
LAST += ("selfnorm, two gates", "crossnorm, channels")
DERIVED = [(kind, "contiguous") for kind in make_layers()] + [(kind, "last") for kind in LAST]
OTHERS = [(kind, "last") for kind in make_layers() if kind not in LAST]


@pytest.mark.parametrize(("kind", "layout"), sampled(DERIVED + OTHERS, len(DERIVED)))
def test_first_and_second_derivatives(kind, layout):
    run, parameters = runner(kind, channels=2)
    x = laid_out(make_batch((5, 2, 1, 2)), layout).detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@EVERY_LAYER
def test_a_gradient_penalty_beside_the_loss(kind):
    """The second backward meets the layer's own backward and that of its derivative at once."""
    run, parameters = runner(kind, channels=2)
    x = make_batch((5, 2, 1, 2)).requires_grad_()

    def penalized(x, *parameters):
        y = run(x, *parameters)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y.sin().sum() + slope.square().sum()

    assert torch.autograd.gradcheck(penalized, (x, *parameters))


# Torch's own: it compiles its decompositions when the first dual tensor is made.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@EVERY_LAYER
def test_forward_mode_and_function_transforms(kind):
    run, parameters = runner(kind)
    x = make_batch((5, 4, 3, 2))
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(x, tangent), *(p.detach() for p in parameters))
        actual = forward_ad.unpack_dual(dual).tangent
    step = 1e-6
    with torch.no_grad():
        ahead, behind = run(x + step * tangent, *parameters), run(x - step * tangent, *parameters)
    assert_close(actual, (ahead - behind) / (2 * step), 1e-7)
    slope = torch.func.grad(lambda x: run(x, *parameters).square().sum())(x)
    x = x.requires_grad_()
    (expected,) = torch.autograd.grad(run(x, *parameters).square().sum(), x)
    assert_close(slope, expected)


@EVERY_LAYER
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_a_layer_saves_one_tensor_of_the_size_of_x(kind, layout):
    layer, arguments = make_layers()[kind]
    if "box" in kind:
        pytest.skip("statistics of a box go through torch's own formulas")
    x = laid_out(make_batch((5, 4, 64, 64)), layout).detach().requires_grad_()
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer.train()(x, *arguments)
    assert sum(sizes) <= 1.03 * x.numel()


def test_frozen_tables_save_nothing_of_the_size_of_x():
    layer = make_cnx().requires_grad_(False)
    x, sizes = make_batch((5, 4, 64, 64)).requires_grad_(), []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, torch.tensor(LABELS))
    assert sum(sizes) < 0.01 * x.numel()
    scale = (layer.weight * (-layer.log_sigma).exp())[LABELS]
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_close(slope, scale[:, :, None, None].expand(x.shape))


@EVERY_LAYER
@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_gradients_where_only_some_are_wanted(kind, frozen):
    run, parameters = runner(kind)
    x = make_batch((5, 4, 3, 2)).requires_grad_()
    cotangent = torch.randn_like(x)
    wanted = parameters if frozen == "x" else (x,)
    if not wanted:
        pytest.skip("no parameters")
    expected = torch.autograd.grad(run(x, *parameters), wanted, cotangent)
    if frozen == "x":
        x = x.detach()
    else:
        parameters = tuple(p.detach() for p in parameters)
    actual = torch.autograd.grad(run(x, *parameters), wanted, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@EVERY_LAYER
def test_a_graph_kept_gives_the_same_gradients_again(kind):
    run, parameters = runner(kind)
    x = make_batch((5, 4, 3, 2)).requires_grad_()
    y = run(x, *parameters)
    first = torch.autograd.grad(y.sin().sum(), (x, *parameters), retain_graph=True)
    second = torch.autograd.grad(y.sin().sum(), (x, *parameters))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EVERY_LAYER
def test_two_forwards_before_backward(kind):
    layer, arguments = make_layers()[kind]
    layer.train()
    xs = [make_batch((5, 4, 3, 2), seed).requires_grad_() for seed in range(2)]
    alone = []
    for x in xs:
        torch.manual_seed(5)
        alone += torch.autograd.grad(copy.deepcopy(layer)(x, *arguments).sin().sum(), x)
    outputs = []
    for x in xs:
        torch.manual_seed(5)
        outputs.append(layer(x, *arguments).sin().sum())
    together = torch.autograd.grad(sum(outputs), xs)
    if "unlabelled" in kind or "posterior" in kind:
        together, alone = together[:1], alone[:1]  # The second saw other running statistics.
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b)


@EVERY_LAYER
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_an_activation_in_place_may_follow(kind, layout):
    run, parameters = runner(kind)
    x = laid_out(make_batch((5, 4, 3, 2)), layout).detach().requires_grad_()
    expected = torch.autograd.grad(run(x, *parameters).relu().sum(), (x, *parameters))
    # The sum's gradient is one number, expanded: another layout than x has.
    actual = torch.autograd.grad(run(x, *parameters).relu_().sum(), (x, *parameters))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
