"""The fused layers: against float64 loops in every layout, derivatives of all kinds, memory."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import normswap
from normswap.functional import Affine, Centred, apply_centred, stat_affine
from tests.support import oracles
from tests.support.acn import make_acn
from tests.support.builders import (
    assert_close,
    make_batch,
    make_cn,
    make_cnx,
    make_instance,
    running_of,
)

FEW = 4
ROUNDOFF = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8}
# The last is large enough for the kernels that take one instance at a time.
SHAPES = [(5, 4, 6), (5, 4, 3, 5), (5, 4, 2, 3, 2), (3, 16, 48, 48)]
LABELS = [2, 0, 2, 1, 0]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(x, layout):
    """Return x contiguous, with channels last, or as every other channel of a wider tensor."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "strided":
        return torch.stack((x, x), 2).flatten(1, 2)[:, ::2]
    if x.dim() not in FORMATS:
        pytest.skip("no such layout")
    return x.contiguous(memory_format=FORMATS[x.dim()])


LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "last", "strided"])


def tables(rows, channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.rand(rows, channels, generator=generator, dtype=torch.float64).add(0.5).to(dtype)
        for _ in range(3)
    ]


def affine_loop(x, centre, scale, shift, rows):
    return torch.stack(
        [
            oracles.affine_sample(x[n], scale[k], shift[k] - centre[k] * scale[k])
            for n, k in enumerate(rows)
        ]
    )


@LAYOUTS
@pytest.mark.parametrize("kind", ["each", "one", "index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_affine_and_its_gradients_equal_a_loop(shape, dtype, kind, layout):
    x = laid_out(make_batch(shape, dtype=dtype), layout).detach().requires_grad_()
    rows = {"each": range(shape[0]), "one": [0] * shape[0], "index": LABELS[: shape[0]]}[kind]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    given = [t.requires_grad_() for t in tables(max(rows) + 1, shape[1], wide)]
    index = torch.tensor(rows) if kind == "index" else None
    y = apply_centred(x, Centred(*given), index)
    reference = [t.detach().double().requires_grad_() for t in (x, *given)]
    expected = affine_loop(*reference, rows)
    cotangent = torch.randn(shape).to(dtype)
    assert y.dtype == dtype
    assert_close(y, expected, 2 * FEW * ROUNDOFF[dtype])
    actual = torch.autograd.grad(y, (x, *given), cotangent)
    wanted = torch.autograd.grad(expected, reference, cotangent.double())
    for share, a, b in zip([dtype] + [wide] * 3, actual, wanted, strict=False):
        assert_close(a, b, 64 * ROUNDOFF[share])


def glue(instances, weight, *, replay):
    std = (instances.var + 0.1).sqrt()
    scale = weight * std.flip(0) / std
    return Affine(scale, instances.mean.flip(0) * torch.tanh(instances.mean) + weight)


def glue_loop(x, weight):
    values = x.flatten(2)
    mean = values.mean(2)
    std = ((values - mean.unsqueeze(2)).square().mean(2) + 0.1).sqrt()
    scale = weight * std.flip(0) / std
    shift = mean.flip(0) * torch.tanh(mean) + weight
    return ((values - mean.unsqueeze(2)) * scale.unsqueeze(2) + shift.unsqueeze(2)).view(x.shape)


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_glue_of_instances_equals_autograd_of_the_formula(shape, layout):
    plain = make_batch(shape)
    x = laid_out(plain, layout).detach().requires_grad_()
    weight = tables(1, shape[1])[0].requires_grad_()
    reference = (plain.requires_grad_(), weight)
    y, expected = stat_affine(x, glue, weight), glue_loop(*reference)
    cotangent = torch.randn(shape, dtype=torch.float64)
    assert_close(y, expected)
    actual = torch.autograd.grad(y, (x, weight), cotangent)
    for a, b in zip(actual, torch.autograd.grad(expected, reference, cotangent), strict=True):
        assert_close(a, b, 1e-10)


def make_layers():
    """Return every layer of the fused kind with the arguments of its forward, in training."""
    labels, partly = torch.tensor(LABELS), torch.tensor([2, -1, 2, 1, -1])
    selfnorm = [normswap.SelfNorm(4, gates, "paper", dtype=torch.float64) for gates in (1, 2)]
    return {
        "cn": (make_cn(), (labels,)),
        "cn, some unlabelled": (make_cn(), (partly,)),
        "cn, posterior": (make_cn(unknown="posterior"), (partly,)),
        "cn-x": (make_cnx(), (labels,)),
        "cn-x, some unlabelled": (make_cnx(), (partly,)),
        "instance": (make_instance(), (labels,)),
        "acn, by instance": (make_acn(assignment="instance"), ()),
        "acn, learned": (make_acn(assignment="instance", statistics="learned"), ()),
        "selfnorm": (selfnorm[0], ()),
        "selfnorm, two gates": (selfnorm[1], ()),
        "crossnorm": (normswap.CrossNorm(p=1.0), ()),
        "crossnorm, style box": (normswap.CrossNorm("style", p=1.0), ()),
        "crossnorm, two boxes": (normswap.CrossNorm("both", p=1.0), ()),
        "crossnorm, channels": (normswap.CrossNorm(instances=1, p=1.0), ()),
    }


EVERY_LAYER = pytest.mark.parametrize("kind", make_layers())


def runner(kind):
    """Return a function of x and the parameters that changes nothing between calls."""
    layer, arguments = make_layers()[kind]
    layer.train()
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        torch.manual_seed(1)
        state = {name: value.clone() for name, value in buffers.items()}
        state |= dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x, *arguments))

    return run, tuple(p.detach().requires_grad_() for p in layer.parameters())


@EVERY_LAYER
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_first_and_second_derivatives(kind, layout):
    run, parameters = runner(kind)
    x = laid_out(make_batch((5, 4, 3, 2)), layout).detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@EVERY_LAYER
def test_a_gradient_penalty_beside_the_loss(kind):
    """The second backward meets the layer's own backward and that of its derivative at once."""
    run, parameters = runner(kind)
    x = make_batch((5, 4, 3, 2)).requires_grad_()

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


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("size", [6, 48])
def test_float32_gradients_far_from_zero_are_as_good_as_batch_norms(size, layout, mean):
    x = laid_out((make_batch((8, 16, size, size), offset=0).float() + mean), layout)
    labels, cotangent = torch.arange(8) % 2, torch.randn_like(x)
    layer = normswap.ContextNorm(16, 2).train()
    norm = nn.BatchNorm2d(16).train()

    def slopes(layer, x, *labels):
        x = x.detach().requires_grad_()
        given = (x, layer.weight)
        found = torch.autograd.grad(layer(x, *labels), given, cotangent[: len(x)].to(x.dtype))
        return [g.double() for g in found]

    def errors(layer, x, *labels):
        exact = slopes(copy.deepcopy(layer).double(), x.double(), *labels)
        rounded = slopes(layer, x, *labels)
        return [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(rounded, exact, strict=True)
        ]

    bound = FEW * max(max(errors(norm, x[labels == k])) for k in range(2))
    assert max(errors(layer, x, labels)) <= bound


def test_one_pass_of_an_autocast_model_keeps_the_gradients_of_float32():
    layer, x = make_cn(dtype=torch.float32).train(), make_batch((5, 4, 6, 6)).float()
    x.requires_grad_()
    labels = torch.tensor(LABELS)
    expected = torch.autograd.grad(copy.deepcopy(layer)(x, labels).sin().sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, labels).sin().sum()
    assert_close(torch.autograd.grad(y, x)[0], expected, FEW * ROUNDOFF[torch.float32])


def test_a_loop_in_float64_agrees_on_maps_of_one_instance_at_a_time():
    x = make_batch((3, 16, 48, 48), dtype=torch.float32)
    layer = make_cn(16, 3, dtype=torch.float32).train()
    before = running_of(layer)
    y = layer(x.contiguous(memory_format=torch.channels_last), torch.tensor([2, 0, 2]))
    given = (layer.weight.double(), layer.bias.double(), before)
    expected = oracles.cn(x.double(), [2, 0, 2], *given, training=True)
    assert_close(y, expected, 2 * FEW * ROUNDOFF[torch.float32])
