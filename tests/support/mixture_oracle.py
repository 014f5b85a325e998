"""ACN in float64 by naive loops, from the formula; independent of the package."""

import math

import torch
from torch import Tensor


def priors_of(logits: Tensor) -> Tensor:
    """Return lambda with its floor of 0.01 / K."""
    count = logits.shape[0]
    powers = [torch.exp(logits[k]) for k in range(count)]
    return torch.stack([0.01 / count + 0.99 * p / sum(powers) for p in powers])


def density(value: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    return torch.exp(-((value - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def shares(parts: list[Tensor]) -> list[Tensor]:
    total = sum(parts)
    return [part / total for part in parts]


def assign(x: Tensor, priors: Tensor, mu: Tensor, sigma: Tensor, assignment: str) -> list[Tensor]:
    """Return tau of each component, K tensors like x (N, C, M)."""
    samples, channels, positions = x.shape
    count = mu.shape[0]
    tau = [torch.zeros_like(x) for _ in range(count)]
    for n in range(samples):
        if assignment == "position":
            parts = []
            for k in range(count):
                product = priors[k, 0]
                for c in range(channels):
                    product = product * density(x[n, c], mu[k, c], sigma[k, c])
                parts.append(product)
            for k, share in enumerate(shares(parts)):
                tau[k] = tau[k].index_put((torch.tensor(n),), share.expand(channels, positions))
            continue
        for c in range(channels):
            deciding = x[n, c] if assignment == "channel" else x[n, c].mean()
            parts = [priors[k, c] * density(deciding, mu[k, c], sigma[k, c]) for k in range(count)]
            for k, share in enumerate(shares(parts)):
                tau[k] = tau[k].index_put(
                    (torch.tensor(n), torch.tensor(c)), share.expand(positions)
                )
    return tau


def acn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    assignment: str,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the mean and variance (K, C) it was normalised with: the batch's, or given."""
    shape, x = x.shape, x.reshape(x.shape[0], x.shape[1], -1)
    priors, sigma = priors_of(logits), torch.exp(log_sigma)
    tau = assign(x, priors, mu, sigma, assignment)
    count, channels = mu.shape
    mean, var = torch.zeros_like(mu), torch.zeros_like(mu)
    outputs = []
    for c in range(channels):
        total = torch.zeros_like(x[:, c])
        for k in range(count):
            if given is None:
                weights = tau[k][:, c] / tau[k][:, c].sum()
                m = (weights * x[:, c]).sum()
                v = (weights * (x[:, c] - m) ** 2).sum()
            else:
                m, v = given[0][k, c], given[1][k, c]
            mean[k, c], var[k, c] = m.detach(), v.detach()
            root = torch.sqrt(priors[k, c if priors.shape[1] > 1 else 0])
            total = total + tau[k][:, c] / root * (x[:, c] - m) / torch.sqrt(v + eps)
        outputs.append(weight[c] * total + bias[c])
    return torch.stack(outputs, 1).reshape(shape), mean, var
