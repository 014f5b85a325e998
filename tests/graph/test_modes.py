"""Modes a forward switches hold where it switches them, whatever they are outside."""

import pytest
import torch

from tests.support.behave import Holder, check, images


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_gradients_switched_off_inside_whatever_the_mode_outside(outer):
    class Model(Holder):
        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(y)

    with outer():
        converted = check(Model(), opaque="switches gradients")
    converted(images(), context=0).sum().backward()
    assert converted.a.conv.weight.grad is None


def test_autocast_switched_off_inside():
    class Model(Holder):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.b(self.a(x))

    converted = check(Model(), opaque="switches gradients or autocast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert converted(images(), context=0).dtype == torch.float32
