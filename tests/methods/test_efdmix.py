"""EFDMix against a float64 loop written from the paper's formula."""

import pytest
import torch

from normswap.methods import efdmix
from normswap.methods.efdmix import EFDMix


def reference(x, share, partners):
    y = torch.empty_like(x)
    for n in range(len(x)):
        for c in range(x.shape[1]):
            own, other = x[n, c].flatten().tolist(), x[partners[n], c].flatten().tolist()
            wanted = sorted(other)
            rank = {value: i for i, value in enumerate(sorted(own))}
            new = [share[n] * v + (1 - share[n]) * wanted[rank[v]] for v in own]
            y[n, c] = torch.tensor(new, dtype=x.dtype).view(x.shape[2:])
    return y


@pytest.fixture
def drawn(monkeypatch):
    share, partners = torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor([2, 0, 3, 1])
    monkeypatch.setattr(efdmix, "draw_beta", lambda *given: share)
    monkeypatch.setattr(efdmix, "draw_partners", lambda *given: partners)
    return share, partners


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 7), (4, 3, 2, 3, 2)])
def test_it_is_the_formula(drawn, shape):
    share, partners = drawn
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    expected = reference(x, share.tolist(), partners)
    torch.testing.assert_close(EFDMix(p=1)(x), expected)
    torch.testing.assert_close(EFDMix(p=1)(x.float()), expected.float())


def test_without_a_share_of_its_own_a_histogram_is_the_partners(drawn):
    x = torch.randn(4, 3, 5, 6)
    y = EFDMix(p=1)(x)
    torch.testing.assert_close(y[0].flatten(1).sort().values, x[2].flatten(1).sort().values)


def test_gradients_are_the_identitys_and_those_of_the_partners_values(drawn):
    share, partners = drawn
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, dtype=torch.float64)
    (EFDMix(p=1)(x) * weight).sum().backward()
    expected = weight.clone()
    for n in range(4):
        for c in range(2):
            own, other = x[n, c].flatten(), x[partners[n], c].flatten()
            pairs = zip(own.argsort().tolist(), other.argsort().tolist(), strict=True)
            for mine, its in pairs:
                moved = (1 - share[n].double()) * weight[n, c].flatten()[mine]
                expected[partners[n], c].view(-1)[its] += moved
    torch.testing.assert_close(x.grad, expected)


def test_memory_format_is_kept_and_low_precision_too(drawn):
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        y = EFDMix(p=1)(x.to(dtype))
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
