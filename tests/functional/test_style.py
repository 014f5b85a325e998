import itertools
import math

import pytest
import torch

from normswap.functional.style import cross_norm, instance_style

SHAPES = [(3, 4, 6), (3, 4, 5, 4), (2, 3, 3, 2, 4)]


def positions_in(box, size):
    low, high = ([0] * len(size), list(size)) if box is None else box.tolist()
    return list(itertools.product(*(range(a, b) for a, b in zip(low, high, strict=True))))


def oracle_style(x, n, c, where, eps):
    """Mean and sqrt(unbiased variance + eps) over positions, one scalar at a time."""
    values = [x[(n, c, *at)] for at in where]
    mean = sum(values) / len(values)
    var = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, (var + eps) ** 0.5


def oracle_cross_norm(x, permutation, instances, content_box=None, style_box=None):
    size = x.shape[2:]
    inside = positions_in(content_box, size)
    y = dict.fromkeys(itertools.product(*map(range, x.shape)))
    for index in y:
        y[index] = x[index]
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        b = (int(permutation[n]), c) if instances == 2 else (n, int(permutation[c]))
        mean, std = oracle_style(x, n, c, inside, 1e-5)
        style_mean, style_std = oracle_style(x, *b, positions_in(style_box, size), 1e-5)
        for at in inside:
            y[(n, c, *at)] = (x[(n, c, *at)] - mean) / std * style_std + style_mean
    return torch.stack([y[index] for index in y]).reshape(x.shape)


def boxes_for(crop, size):
    content = torch.tensor([[0] * len(size), [e - 1 for e in size]])
    style = torch.tensor([[e - 2 for e in size], list(size)])
    return (
        content if crop in ("content", "both") else None,
        style if crop in ("style", "both") else None,
    )


@pytest.mark.parametrize("crop", ["neither", "style", "content", "both"])
@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_norm_and_its_gradient_match_the_loop(shape, instances, crop):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).add_(1).requires_grad_()
    permutation = torch.randperm(shape[0 if instances == 2 else 1]).roll(1)
    boxes = boxes_for(crop, shape[2:])
    y = cross_norm(x, permutation, instances, *boxes)
    expected = oracle_cross_norm(x, permutation, instances, *boxes)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(x)
    grads = [torch.autograd.grad((out * cotangent).sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("instances", [1, 2])
def test_gradient_flows_through_the_style_statistics(instances):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    swap = torch.tensor([1, 0])
    cotangent = torch.randn(3, 3, dtype=torch.float64)
    source = (1, 0) if instances == 2 else (0, 1)
    grads = []
    for y in (cross_norm(x, swap, instances), oracle_cross_norm(x, swap, instances)):
        # Only A's output counts, so all of B's gradient comes from its statistics.
        grads.append(torch.autograd.grad((y[0, 0] * cotangent).sum(), x)[0][source])
    assert grads[0].abs().min() > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("crop", ["neither", "both"])
def test_cross_norm_passes_gradcheck(crop):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    boxes = boxes_for(crop, (3, 3))
    run = lambda t: cross_norm(t, torch.tensor([1, 0]), 2, *boxes)  # noqa: E731
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_cross_norm_swaps_mean_and_spread():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 5]).reshape(2, 1, 1, 1)
    y = cross_norm(x, torch.tensor([1, 0]))
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)).flip(0))
    torch.testing.assert_close(y.std((2, 3)), x.std((2, 3)).flip(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("instances", [1, 2])
def test_the_identity_permutation_gives_x_back(instances):
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(cross_norm(x, torch.arange(3), instances), x, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 3, 1, 1), (4, 3, 1, 1, 1), (4, 3, 0)])
def test_maps_of_one_position_are_left_alone(shape):
    x = torch.randn(shape)
    assert cross_norm(x, torch.randperm(4)) is x


@pytest.mark.parametrize("which", ["content_box", "style_box"])
def test_a_box_of_one_position_leaves_x_and_its_gradient_alone(which):
    x = torch.randn(2, 3, 3, 3, requires_grad=True)
    box = torch.tensor([[1, 1], [2, 2]])
    y = cross_norm(x, torch.tensor([1, 0]), **{which: box})
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_values_outside_of_the_style_box_do_not_matter():
    x = torch.randn(2, 1, 4, 4)
    box = torch.tensor([[0, 0], [2, 2]])
    poisoned = x.clone()
    poisoned[:, :, 3, 3] = torch.nan
    poisoned[:, :, 2, 2] = torch.inf
    poisoned.requires_grad_()
    style = instance_style(poisoned, box)
    for value, expected in zip(style, instance_style(x[..., :2, :2]), strict=True):
        torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(style.std.sum() + style.mean.sum(), poisoned)
    assert gradient.isfinite().all()
    assert gradient[:, :, 2:].eq(0).all()


@pytest.mark.parametrize("fire", [True, False])
def test_a_tensor_decides_whether_it_fires(fire):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    swap = torch.tensor([1, 0])
    y = cross_norm(x, swap, fire=torch.tensor(fire))
    assert torch.equal(y, cross_norm(x, swap) if fire else x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert fire or gradient.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_kept_and_accumulates_in_float32(dtype):
    x = (torch.randn(2, 3, 32, 32) * 3 + 50).to(dtype)
    y = cross_norm(x, torch.tensor([1, 0]))
    assert y.dtype == dtype
    expected = cross_norm(x.double(), torch.tensor([1, 0])).to(dtype)
    # One rounding to the result's dtype; float32 noise may move a value across a midpoint.
    apart = (y.double() - expected.double()).abs() / expected.double().abs()
    assert apart.max() <= torch.finfo(dtype).eps
    assert (apart > 0).double().mean() < 0.01


def test_memory_format_is_kept():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for boxes in (boxes_for("neither", (4, 5)), boxes_for("both", (4, 5))):
        y = cross_norm(x, torch.tensor([1, 0]), 2, *boxes)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
def test_style_of_a_constant_channel_is_finite_with_its_gradient(shape):
    for eps in (1e-5, 1e-12):
        x = torch.full(shape, 0.1, dtype=torch.float16, requires_grad=True)
        style = instance_style(x, eps=eps)
        torch.testing.assert_close(
            style.std, torch.full(shape[:2], math.sqrt(eps)), rtol=0.05, atol=0
        )
        (gradient,) = torch.autograd.grad(style.std.sum(), x)
        assert gradient.isfinite().all()


def test_a_single_position_has_no_spread_and_no_nan():
    x = torch.randn(2, 3, 1, 1, requires_grad=True)
    style = instance_style(x)
    assert style.std.eq(0).all()
    assert torch.equal(style.mean, x.flatten(1))
    (gradient,) = torch.autograd.grad(style.mean.sum() + style.std.sum(), x)
    assert gradient.eq(1).all()
