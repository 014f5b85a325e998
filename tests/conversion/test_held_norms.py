"""Norms that a model holds in more places than its modules."""

import pytest
import torch
from torch import nn

import normswap
from tests.support.rows import LABELS, K, N, apart


def test_a_norm_also_held_in_a_plain_list_is_replaced_there_too():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("norm", nn.BatchNorm1d(6))
            self.layers = [self.norm]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    original = Held().double().eval()
    model = apart(normswap.convert(original, "cn", contexts=K))
    assert model.layers[0] is model.norm
    assert original.layers[0] is original.norm
    x = torch.randn(N, 6, dtype=torch.float64)
    singly = [model(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(model(x, context=LABELS), torch.cat(singly), rtol=1e-12)
    assert not model(x, context=LABELS).allclose(model(x))


def test_a_norm_held_by_a_bound_method_is_refused():
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.function = self.norm.forward

        def forward(self, x):
            return self.function(x)

    model = Bound()
    with pytest.raises(normswap.ConversionError, match=r"holds a norm to be replaced.*exclude='"):
        normswap.convert(model, inplace=True)
    assert isinstance(model.norm, nn.BatchNorm1d)
