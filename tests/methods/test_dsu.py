"""DSU against a float64 loop written from the paper's formula."""

import pytest
import torch
from torch.autograd import gradcheck

from normswap.methods.dsu import DSU


def reference(x, noise, eps=1e-6):
    n, c = x.shape[:2]
    mean = torch.stack([torch.stack([x[i, j].mean() for j in range(c)]) for i in range(n)])
    var = [[x[i, j].var(correction=1) for j in range(c)] for i in range(n)]
    std = (torch.stack([torch.stack(row) for row in var]) + eps) ** 0.5
    y = torch.empty_like(x)
    for j in range(c):
        far_mean = (mean[:, j].var(correction=1) + eps) ** 0.5
        far_std = (std[:, j].var(correction=1) + eps) ** 0.5
        for i in range(n):
            beta = mean[i, j] + noise[0, i, j] * far_mean
            gamma = std[i, j] + noise[1, i, j] * far_std
            y[i, j] = gamma * (x[i, j] - mean[i, j]) / std[i, j] + beta
    return y


@pytest.fixture
def noise(monkeypatch):
    drawn = torch.randn(2, 4, 3, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *given, dtype, **more: drawn.to(dtype))
    return drawn


@pytest.mark.parametrize("trailing", [(5, 6), (7,), (2, 3, 2)])
def test_it_is_the_formula(noise, trailing):
    x = torch.rand(4, 3, *trailing, dtype=torch.float64) * 3 + 1
    expected = reference(x, noise)
    torch.testing.assert_close(DSU(p=1)(x), expected)
    torch.testing.assert_close(DSU(p=1)(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_gradients_go_through_every_statistic(noise):
    x = torch.rand(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(DSU(p=1), (x,))


def test_statistics_are_drawn_as_far_apart_as_the_batchs():
    x = torch.randn(8, 1, 16, 16) + 3 * torch.randn(8, 1, 1, 1)
    moved = torch.stack([(DSU(p=1)(x) - x).mean((1, 2, 3)) for _ in range(500)])
    expected = x.mean((1, 2, 3)).std()
    assert abs(float(moved.std() / expected) - 1) < 0.1
    assert abs(float(moved.mean())) < 0.2 * float(expected)
