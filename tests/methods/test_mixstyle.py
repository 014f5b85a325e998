"""MixStyle against a float64 loop written from the paper's formula."""

import pytest
import torch

import normswap
from normswap.functional.draws import draw_partners
from normswap.methods import mixstyle
from normswap.methods.mixstyle import MixStyle


def reference(x, share, partners, eps=1e-6):
    y = torch.empty_like(x)
    for n in range(len(x)):
        for c in range(x.shape[1]):
            own, other = x[n, c], x[partners[n], c]
            sigma, sigma_other = ((v.var(correction=1) + eps) ** 0.5 for v in (own, other))
            mean = share[n] * own.mean() + (1 - share[n]) * other.mean()
            spread = share[n] * sigma + (1 - share[n]) * sigma_other
            y[n, c] = (own - own.mean()) / sigma * spread + mean
    return y


@pytest.fixture
def drawn(monkeypatch):
    share, partners = torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor([2, 0, 3, 1])
    monkeypatch.setattr(mixstyle, "draw_beta", lambda *given: share)
    monkeypatch.setattr(mixstyle, "draw_partners", lambda *given: partners)
    return share, partners


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 7), (4, 3, 2, 3, 2)])
def test_it_is_the_formula(drawn, shape):
    share, partners = drawn
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    expected = reference(x, share.double(), partners)
    torch.testing.assert_close(MixStyle(p=1)(x), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(MixStyle(p=1)(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_no_gradient_goes_through_the_statistics(drawn):
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    share, partners = drawn
    MixStyle(p=1)(x).sum().backward()
    sigma = (x.detach().var((2, 3), keepdim=True) + 1e-6).sqrt()
    share = share.double().view(4, 1, 1, 1)
    expected = (share * sigma + (1 - share) * sigma[partners]) / sigma
    torch.testing.assert_close(x.grad, expected.expand_as(x), rtol=1e-6, atol=1e-7)


def test_it_acts_with_probability_p_and_never_in_eval():
    layer, x = MixStyle(p=0.3), torch.randn(4, 3, 5, 5)
    changed = sum(not torch.equal(layer(x), x) for _ in range(400))
    assert 85 <= changed <= 155  # 120 expected, standard deviation 9
    assert layer.eval()(x) is x
    assert torch.equal(MixStyle(p=0)(x), x)


@pytest.mark.parametrize("count", [2, 6, 7])
def test_partners_across_domains_are_of_the_other_half(count):
    low, kept = count // 2, count - count // 2
    drawn = {tuple(draw_partners(count, "crossdomain").tolist()) for _ in range(50)}
    assert all(sorted(partners) == list(range(count)) for partners in drawn)
    assert all(min(p[:kept]) >= low and max(p[kept:]) < low for p in drawn)
    assert len(drawn) > 1 or count == 2


def test_a_batch_of_one_and_a_single_position_are_left_alone():
    for shape in ((1, 3, 4, 4), (4, 3, 1, 1), (4, 3), (0, 3, 4, 4)):
        x = torch.randn(shape)
        assert MixStyle(p=1)(x) is x


@pytest.mark.parametrize(
    "options", [{"p": 2}, {"alpha": 0}, {"mix": "domains"}, {"eps": 0}, {"lambda_": 1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises((normswap.ConversionError, normswap.UnknownNameError)):
        normswap.plan(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), "mixstyle", **options)
