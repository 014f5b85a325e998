"""Naive float64 references, written from the formulas; they never call the package.

Loops over contexts, samples and steps, plain tensor arithmetic, so that autograd gives reference
gradients. Every function takes and returns float64.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Running:
    """Running statistics of CN: (K, C) mean and variance, and how many batches each met."""

    mean: Tensor
    var: Tensor
    tracked: list[int] = field(default_factory=list)

    @classmethod
    def fresh(cls, num_contexts: int, channels: int) -> "Running":
        shape = (num_contexts, channels)
        zeros = torch.zeros(shape, dtype=torch.float64)
        return cls(zeros, torch.ones_like(zeros), [0] * num_contexts)


def rows_of(labels: list[int], context: int) -> list[int]:
    return [n for n, label in enumerate(labels) if label == context]


def values_of(x: Tensor, rows: list[int]) -> Tensor:
    """Return every value of each channel among some samples, (C, values)."""
    return torch.cat([x[n].reshape(x.shape[1], -1) for n in rows], dim=1)


def biased_variance(values: Tensor, mean: Tensor) -> Tensor:
    return ((values - mean.unsqueeze(1)) ** 2).sum(1) / values.shape[1]


def affine_sample(sample: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``scale * sample + shift`` for one sample (C, *)."""
    shape = (-1,) + (1,) * (sample.dim() - 1)
    return sample * scale.reshape(shape) + shift.reshape(shape)


def normalize_sample(
    sample: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    shape = (-1,) + (1,) * (sample.dim() - 1)
    centred = sample - mean.reshape(shape)
    return affine_sample(centred / torch.sqrt(var + eps).reshape(shape), weight, bias)


def pooled(mean: Tensor, var: Tensor, priors: list[float]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the mixture of the contexts' Gaussians."""
    m = sum(p * mean[k] for k, p in enumerate(priors))
    v = sum(p * (var[k] + (mean[k] - m) ** 2) for k, p in enumerate(priors))
    return m, v


def posterior(sample: Tensor, mean: Tensor, var: Tensor, priors: list[float]) -> Tensor:
    """Return the probability of each context for one sample (C, *).

    Gaussian log-densities of its values, averaged over positions and summed over channels.
    """
    values = sample.reshape(sample.shape[0], -1)
    logs = []
    for k, p in enumerate(priors):
        density = -0.5 * torch.log(2 * math.pi * var[k].unsqueeze(1)) - (
            values - mean[k].unsqueeze(1)
        ) ** 2 / (2 * var[k].unsqueeze(1))
        logs.append(math.log(p) + density.mean(1).sum())
    logits = torch.stack(logs)
    weights = torch.exp(logits - logits.max())
    return weights / weights.sum()


def cn_unknown(
    sample: Tensor,
    running: Running,
    weight: Tensor,
    bias: Tensor,
    priors: list[float],
    eps: float,
    unknown: str | int,
) -> Tensor:
    """CN of one sample without a label."""
    root = [math.sqrt(p) for p in priors]
    if isinstance(unknown, int):
        k = unknown
        return normalize_sample(
            sample, running.mean[k], running.var[k], weight[k] / root[k], bias[k] / root[k], eps
        )
    if unknown == "pooled":
        mean, var = pooled(running.mean, running.var, priors)
        gamma = sum(p * weight[k] / root[k] for k, p in enumerate(priors))
        beta = sum(p * bias[k] / root[k] for k, p in enumerate(priors))
        return normalize_sample(sample, mean, var, gamma, beta, eps)
    share = posterior(sample, running.mean, running.var + eps, priors)
    parts = [
        share[k]
        * normalize_sample(
            sample, running.mean[k], running.var[k], weight[k] / root[k], bias[k] / root[k], eps
        )
        for k in range(len(priors))
    ]
    return torch.stack(parts).sum(0)


def drawn_moments(
    x: Tensor, labels: list[int], context: int, shrink: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return a context's mean and biased variance, drawn towards those of all labelled samples.

    Both are of a mixture of its own values, which weigh n / (n + shrink) for n samples, and all.
    """
    rows = rows_of(labels, context)
    own, every = values_of(x, rows), values_of(x, [n for n, k in enumerate(labels) if k >= 0])
    parts = [(1 / (1 + shrink / len(rows)), own), (1 - 1 / (1 + shrink / len(rows)), every)]
    mean = sum(share * values.sum(1) / values.shape[1] for share, values in parts)
    return mean, sum(share * biased_variance(values, mean) for share, values in parts)


def cn(
    x: Tensor,
    labels: list[int],
    weight: Tensor,
    bias: Tensor,
    running: Running,
    priors: list[float] | None = None,
    eps: float = 1e-5,
    unknown: str | int = "pooled",
    training: bool = False,
    shrink: float = 0.0,
) -> Tensor:
    """Context normalization; in training, batch statistics over the samples of each context.

    A weight and bias (C,) are one for all contexts, which the roots of the priors do not divide.
    """
    count = running.mean.shape[0]
    priors = priors or [1 / count] * count
    if weight.dim() == 1:
        weight, bias = (torch.stack([math.sqrt(p) * t for p in priors]) for t in (weight, bias))
    statistics = []
    for k in range(count):
        rows = rows_of(labels, k)
        mean, var = running.mean[k], running.var[k]
        if training and rows and values_of(x, rows).shape[1] > 1:
            mean, var = drawn_moments(x, labels, k, shrink)
        statistics.append((mean, var))
    outputs = []
    for n, label in enumerate(labels):
        if label < 0:
            outputs.append(cn_unknown(x[n], running, weight, bias, priors, eps, unknown))
            continue
        mean, var = statistics[label]
        root = math.sqrt(priors[label])
        outputs.append(normalize_sample(x[n], mean, var, weight[label], bias[label], eps) / root)
    return torch.stack(outputs)


def cn_update(
    x: Tensor,
    labels: list[int],
    running: Running,
    momentum: float | None = 0.1,
    shrink: float = 0.0,
) -> Running:
    """Return the running statistics after one training batch; unbiased variance."""
    mean, var, tracked = running.mean.clone(), running.var.clone(), list(running.tracked)
    for k in range(mean.shape[0]):
        rows = rows_of(labels, k)
        if not rows or values_of(x, rows).shape[1] < 2:
            continue
        values = values_of(x, rows).shape[1]
        tracked[k] += 1
        rate = 1 / tracked[k] if momentum is None else momentum
        batch_mean, biased = drawn_moments(x.detach(), labels, k, shrink)
        unbiased = biased * values / (values - 1)
        mean[k] = (1 - rate) * mean[k] + rate * batch_mean
        var[k] = (1 - rate) * var[k] + rate * unbiased
    return Running(mean, var, tracked)


def cnx(
    x: Tensor,
    labels: list[int],
    weight: Tensor,
    bias: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    priors: list[float] | None = None,
    unknown: str | int = "pooled",
) -> Tensor:
    """Context normalization with learned statistics, in either mode."""
    count = mu.shape[0]
    priors = priors or [1 / count] * count
    var = torch.exp(log_sigma) ** 2
    outputs = []
    for n, label in enumerate(labels):
        k = unknown if label < 0 else label
        if isinstance(k, int):
            outputs.append(normalize_sample(x[n], mu[k], var[k], weight, bias, 0.0))
        elif k == "pooled":
            outputs.append(normalize_sample(x[n], *pooled(mu, var, priors), weight, bias, 0.0))
        else:
            share = posterior(x[n], mu, var, priors)
            parts = [
                share[k] * normalize_sample(x[n], mu[k], var[k], weight, bias, 0.0)
                for k in range(count)
            ]
            outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)


def cnx_start(x: Tensor, labels: list[int], count: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return (mu, log sigma) a fresh layer takes from a batch."""
    everyone = list(range(x.shape[0]))
    mu, log_sigma = [], []
    for k in range(count):
        rows = rows_of(labels, k)
        if not rows or values_of(x, rows).shape[1] < 2:
            rows = everyone
        values = values_of(x, rows)
        mean = values.sum(1) / values.shape[1]
        mu.append(mean)
        log_sigma.append(0.5 * torch.log(biased_variance(values, mean) + eps))
    return torch.stack(mu), torch.stack(log_sigma)


def conditional_instance(
    x: Tensor,
    labels: list[int],
    weight: Tensor,
    bias: Tensor,
    priors: list[float] | None = None,
    eps: float = 1e-5,
    unknown: str | int = "pooled",
) -> Tensor:
    """Instance norm whose affine depends on the context; mean affine for unknown labels."""
    count = weight.shape[0]
    priors = priors or [1 / count] * count
    outputs = []
    for n, label in enumerate(labels):
        values = values_of(x, [n])
        mean = values.sum(1) / values.shape[1]
        k = unknown if label < 0 else label
        if isinstance(k, int):
            gamma, beta = weight[k], bias[k]
        else:
            gamma = sum(p * weight[j] for j, p in enumerate(priors))
            beta = sum(p * bias[j] for j, p in enumerate(priors))
        var = biased_variance(values, mean)
        outputs.append(normalize_sample(x[n], mean, var, gamma, beta, eps))
    return torch.stack(outputs)


def batch_norm_error(x: Tensor, eps: float = 1e-5, training: bool = True) -> float:
    """Return torch's own batch norm error in float32 against float64, on this data."""
    x = x.detach()
    dims = [0, *range(2, x.dim())]
    mean, var = x.double().mean(dims), x.double().var(dims, correction=0)
    mean, var = (None, None) if training else (mean, var)
    outputs = []
    for dtype in (torch.float32, torch.float64):
        statistics = [None if t is None else t.to(dtype) for t in (mean, var)]
        outputs.append(
            torch.nn.functional.batch_norm(x.to(dtype), *statistics, training=training, eps=eps)
        )
    return float((outputs[0].double() - outputs[1]).abs().max())
