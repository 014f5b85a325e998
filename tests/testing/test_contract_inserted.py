"""What every method that inserts layers promises, on a model of timm."""

import copy

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.methods.base import InsertedMethod, get_method

METHODS = [n for n in normswap.methods() if isinstance(get_method(n), InsertedMethod)]
EACH = pytest.mark.parametrize("method", METHODS)


def make_model():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(n=4, size=32):
    return torch.randn(n, 3, size, size)


def trained(method, **settings):
    """Return a converted model after a few steps, so that its layers are not the identity."""
    model = normswap.convert(make_model(), method, **settings).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(images(8)).square().mean().backward()
        optimizer.step()
    return model.eval()


@EACH
def test_function_is_kept_bitwise_in_eval(method):
    model = make_model()
    x = images()
    assert normswap.convert(model, method)(x).equal(model(x))


@EACH
def test_contexts_are_refused(method):
    with pytest.raises(normswap.ConversionError, match="takes no contexts"):
        normswap.convert(make_model(), method, contexts=3)


@EACH
def test_grad_checkpointing_changes_no_gradient(method):
    plain = trained(method).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(True)
    x = images(8)
    for model in (plain, checkpointed):
        model.zero_grad()
        torch.manual_seed(3)
        (model(x).square().mean() + model(x.flip(0)).sin().mean()).backward()
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6) for a, b in pairs)


@EACH
def test_a_container_that_stops_being_traceable_is_an_error_not_a_silent_skip(method):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)
            self.odd = False

        def forward(self, x):
            if self.odd:
                x = torch.stack([row * 2 for row in x])
            return x + self.bn(self.conv(x))

    model = normswap.convert(Block().eval(), method, placement="post")
    model.odd = True
    with pytest.raises(normswap.ConversionError, match="to run as it was traced"):
        model(images().abs())
