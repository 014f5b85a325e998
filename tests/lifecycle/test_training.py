"""Averages of weights, accumulated gradients and autocast."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3

import normswap
from tests.support.models import ConvNet
from tests.support.training import METHODS, convert, takes_context


@pytest.mark.parametrize("method", METHODS)
def test_the_average_of_a_model_is_its_running_mean(method):
    model = convert(ConvNet(), method).train()
    ema = ModelEmaV3(model, decay=0.5)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.5 * (start[name] + model.state_dict()[name]))
    x = torch.randn(2, 3, 6, 6)
    assert ema.module(x).shape == (2, 5)


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn", "selfnorm"])
def test_accumulated_gradients_are_those_of_the_sum(method):
    model = convert(ConvNet(), method)
    normswap.freeze(model, train="all", stats="frozen")  # batches are then independent
    model.double().train()
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def backward(rows):
        given = (x[rows], labels[rows]) if takes_context(method) else (x[rows],)
        model(*given).square().sum().backward()

    backward(slice(0, 6))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backward(slice(0, 2))
    backward(slice(2, 6))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_with_a_scaler_trains_float32_statistics(method, dtype):
    model = convert(ConvNet(), method).train()
    optimizer = torch.optim.SGD(normswap.param_groups(model, 0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, labels = torch.randn(6, 3, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype):
        given = (x, labels) if takes_context(method) else (x,)
        loss = model(*given).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = model.state_dict()
    assert all(v.dtype == before[n].dtype for n, v in after.items())
    assert all(bool(v.isfinite().all()) for v in after.values())
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert {"stem.0.weight", "head.weight"} <= set(moved)
