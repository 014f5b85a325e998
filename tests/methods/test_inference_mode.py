"""Layers in inference mode, where gradients may be switched on and nothing is recorded."""

import copy

import pytest
import torch
from torch import nn

import normswap


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", normswap.methods())
@pytest.mark.filterwarnings("ignore::normswap.errors.AdviceWarning")
def test_gradients_switched_on_inside_change_nothing(method: str, training: bool) -> None:
    labelled = normswap.get_method(method).needs_context
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = normswap.convert(base, method, contexts=3 if labelled else None)
    model.train(training)
    other = copy.deepcopy(model)
    x = torch.randn(4, 3, 4, 4)
    labels = {"context": torch.tensor([0, 1, 2, 0])} if labelled else {}
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(x, **labels)
    torch.manual_seed(0)
    with torch.inference_mode(), torch.enable_grad():
        y = other(x, **labels)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)
