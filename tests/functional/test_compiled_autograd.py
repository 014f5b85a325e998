"""Backward as torch.compile's compiled autograd runs it, which traces the code of Functions."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap

# Any backend tells whether the code of Functions can be traced, and is left alone where it cannot.
COMPILED = torch.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch's tracing reads
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cn", {"contexts": 3}),
        ("cn-x", {"contexts": 3}),
        ("selfnorm", {}),
        ("crossnorm", {"placement": "norm"}),
        pytest.param("acn", {}, marks=pytest.mark.exhaustive),  # much to trace
        pytest.param("acn", {"assignment": "position"}, marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_are_those_of_eager_autograd(method: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = normswap.convert(base.double(), method, **options).train()
    for layer in model.modules():
        if isinstance(layer, normswap.CrossNorm):
            layer.p = 1.0
    other = copy.deepcopy(model)
    x = torch.randn(4, 3, 3, 3, dtype=torch.double)
    labels = {"context": torch.tensor([0, 1, 2, 0])} if "contexts" in options else {}
    torch.manual_seed(0)
    model(x, **labels).square().sum().backward()
    torch.manual_seed(0)
    with torch._dynamo.compiled_autograd._enable(COMPILED):
        other(x, **labels).square().sum().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(two.grad, one.grad, msg=name)
