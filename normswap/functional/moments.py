"""Means and variances: of an instance, of a context, of a mixture of contexts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Devices that have no float64.
WITHOUT_FLOAT64 = ("mps",)


class Moments(NamedTuple):
    """Mean and biased variance; the shape of both is (rows, C)."""

    mean: Tensor
    var: Tensor

    def where(self, condition: Tensor, other: "Moments") -> "Moments":
        """Keep the values where `condition` holds, take the others from `other`."""
        return Moments(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that statistics of x accumulate in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype: most are, and asking torch to convert those takes its time."""
    return t if t.dtype == dtype else t.to(dtype)


def wide_dtype(t: Tensor) -> torch.dtype:
    """Return float64, or float32 on devices without it.

    For small sums and products where float32 is not enough. Autocast leaves float64 alone; it
    would compute a float32 product in bfloat16.
    """
    return torch.float32 if t.device.type in WITHOUT_FLOAT64 else torch.float64


def widen(t: Tensor) -> Tensor:
    """Return a tensor in `wide_dtype`."""
    return t.to(wide_dtype(t))


def log_spread(var: Tensor, eps: float) -> Tensor:
    """Return ``0.5 * log(var + eps)``, in `wide_dtype`."""
    return 0.5 * (widen(var) + eps).log()


def instance_moments(x: Tensor) -> Moments:
    """Return the mean and biased variance of each channel of each instance.

    Shape:
        x: (N, C, *), any number of trailing dimensions including none.
        mean, var: (N, C), float32 or, for float64 input, float64.
    """
    x = x.to(compute_dtype(x))
    if x.dim() == 2:
        return Moments(x, torch.zeros_like(x))
    positions = tuple(range(2, x.dim()))
    if x.numel() == 0:
        return Moments(x.sum(positions), x.sum(positions))  # var_mean warns of it
    var, mean = torch.var_mean(x, dim=positions, correction=0)
    return Moments(mean, var)


def context_moments(
    instances: Moments,
    index: Tensor,
    num_contexts: int,
    size: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Moments]:
    """Pool instance statistics within each context, by the law of total variance.

    With instances of s_n values a channel, and ``S_k = sum_n s_n`` over those of context k:
    ``mu_k = sum_n s_n m_n / S_k``, ``V_k = sum_n s_n [v_n + (m_n - mu_k)^2] / S_k``.
    Segment sums, so that the cost does not depend on the number of contexts.

    Args:
        instances: mean and biased variance of each instance, (N, C).
        index: int64 (N,) in [0, K]; rows with K belong to no context.
        num_contexts: K.
        size: values in a channel of an instance; the same for all instances given here.
        reduce: sums a tensor over processes, each with its own instances and its own size;
            called once. By default the instances here are all.

    Returns:
        counts: values in a channel of each context, (K,); instances, for the default size.
        moments: (K, C); zero where a context is absent.
    """
    dtype = instances.mean.dtype
    # Segments are summed in order: float32 would lose digits as the batch grows.
    mean, var = map(widen, instances)
    ones = mean.new_ones(mean.shape[0], 1)
    counts = size * segment_sum(ones, index, num_contexts + 1)
    share = counts.clamp(min=1).reciprocal()
    mu = size * segment_sum(mean, index, num_contexts + 1) * share
    spread = var + (mean - pick_rows(mu, index)).square()
    var = size * segment_sum(spread, index, num_contexts + 1) * share
    counts, mu, var = (t[:num_contexts] for t in (counts, mu, var))
    if reduce is not None:
        counts, (mu, var) = combine_moments(counts, Moments(mu, var), reduce)
    return counts.squeeze(1).to(dtype), Moments(mu.to(dtype), var.to(dtype))


def shrink_moments(values: Tensor, moments: Moments, amount: float) -> Moments:
    """Draw the moments of each context towards those of all contexts together.

    With the moments m_B, v_B of all, a share ``w_k = n_k / (n_k + a)`` of its own for a context
    with n_k values: ``m_k' = w_k m_k + (1 - w_k) m_B``, the same for the mean square, and
    ``v_k' = w_k [v_k + (m_k - m_k')^2] + (1 - w_k) [v_B + (m_B - m_k')^2]``.

    Args:
        values: n_k, (K, 1).
        moments: (K, C); those of a context without values do not matter.
        amount: a, in values; 0 leaves each context its own, infinity gives all the same.
    """
    mean, var = moments
    total = values.sum(0).clamp(min=1)
    whole = (values * mean).sum(0) / total
    spread = (values * (var + (mean - whole).square())).sum(0) / total
    share = values / (values + amount).clamp(min=1)
    drawn = torch.lerp(whole.expand_as(mean), mean, share.expand_as(mean))
    own, common = var + (mean - drawn).square(), spread + (whole - drawn).square()
    return Moments(drawn, torch.lerp(common, own, share.expand_as(own)))


def combine_moments(
    counts: Tensor, moments: Moments, reduce: Callable[[Tensor], Tensor], least: float = 1.0
) -> tuple[Tensor, Moments]:
    """Return the counts and moments of what all processes have, with one sum over them.

    From ``S0 = n``, ``S1 = n m``, ``S2 = n (v + m^2)``, summed in float64: every process has
    moments that lost no digits, so only the differences between processes need the wide sums.

    Args:
        counts: values, or mass, that the moments here are over, (K, 1) or (K, C).
        moments: (K, C).
        reduce: sums a tensor over processes.
        least: counts below this have no moments.

    Returns:
        The counts and moments over all, in the dtype of `moments`.
    """
    dtype = moments.mean.dtype
    n, m, v = map(widen, (counts, *moments))
    sums = reduce(torch.cat((n, n * m, n * (v + m.square())), 1))
    width, channels = n.shape[1], m.shape[1]
    total, first, second = sums[:, :width], sums[:, width:-channels], sums[:, -channels:]
    share = total.clamp(min=least).reciprocal()
    mean = first * share
    var = (second * share - mean.square()).clamp(min=0)
    return total.to(dtype), Moments(mean.to(dtype), var.to(dtype))


def _embeds(t: Tensor, index: Tensor) -> bool:
    """Return whether an embedding and its derivative, a segment sum, are the faster kernels.

    On the CPU they are, several times. Elsewhere their derivative may make the host wait.
    """
    return t.device.type == "cpu" and index.numel() > 0 and not torch.compiler.is_compiling()


def pick_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return the rows (N, C) of a table (K, C) that an index (N,) names."""
    return torch.embedding(table, index) if _embeds(table, index) else table.index_select(0, index)


def segment_sum(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Return the sum of the rows (N, C) that share an index, (count, C)."""
    if _embeds(values, index):
        total: Tensor = torch.ops.aten.embedding_dense_backward(values, index, count, -1, False)
        return total
    return values.new_zeros(count, values.shape[1]).index_add(0, index, values)


def segment_mean(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the rows (N, C) that share an index, (K, C), given their counts (K, 1)."""
    if _embeds(values, index):
        kernel: Any = torch.ops.aten.embedding_dense_backward
        found: Tensor = kernel(values, index, len(counts), -1, True)  # divides by the counts
        return found
    return segment_sum(values, index, len(counts)) / counts.clamp(min=1)


def pool_moments(moments: Moments, priors: Tensor) -> Moments:
    """Return the one Gaussian with the mean and variance of a mixture of contexts.

    ``m = sum_k lambda_k m_k``, ``v = sum_k lambda_k (v_k + (m_k - m)^2)``.

    Shape:
        moments: (K, C); priors: (K,), or (K, C) where channels differ; sums to one over K;
        result: (1, C).
    """
    weights = priors.reshape(priors.shape[0], -1)
    mean = (weights * moments.mean).sum(0, keepdim=True)
    var = (weights * (moments.var + (moments.mean - mean).square())).sum(0, keepdim=True)
    return Moments(mean, var)


def context_posterior(instances: Moments, contexts: Moments, priors: Tensor, eps: float) -> Tensor:
    """Return the probability of each context given an instance's own channel statistics.

    Each position of the instance is a draw from the context's Gaussian; the log-likelihood is
    averaged over positions and summed over channels:
    ``log w_nk = log lambda_k - 1/2 sum_c [log V_kc + (v_nc + (m_nc - mu_kc)^2) / V_kc]``
    with ``V = v + eps``; the weights of an instance sum to one.

    Shape:
        instances: (N, C); contexts: (K, C); priors: (K,); result: (N, K).
    """
    dtype, wide = instances.mean.dtype, wide_dtype(instances.mean)
    mean, var, means, variances = (t.to(wide) for t in (*instances, *contexts))
    precision = (variances + eps).reciprocal()
    # sum_c (v + (m - mu)^2) / V, expanded so that nothing of size N * K * C is made; centred on
    # the average context, since the expansion loses digits to a large common mean.
    centre = means.mean(0)
    m, mu = mean - centre, means - centre
    distance = (
        (var + m.square()) @ precision.T
        - 2 * m @ (mu * precision).T
        + (mu.square() * precision).sum(1)
    )
    logits = priors.to(wide).log() + 0.5 * precision.log().sum(1) - 0.5 * distance
    return logits.softmax(1).to(dtype)


def gaussian_divergences(moments: Moments, priors: Tensor) -> Tensor:
    """Return how far each context's Gaussian is from the pooled one, in nats, (K, C).

    The Kullback-Leibler divergence
    ``KL_k = 1/2 [log(v / v_k) + (v_k + (m_k - m)^2) / v - 1]``; 0 where all are equal. A channel
    without spread counts with the smallest positive variance.

    Shape:
        moments: (K, C); priors: (K,) or (K, C).
    """
    mean, var = map(widen, moments)
    tiny = torch.finfo(torch.float32).tiny
    pooled = pool_moments(Moments(mean, var), widen(priors))
    ratio = var.clamp(min=tiny) / pooled.var.clamp(min=tiny)
    shift = (mean - pooled.mean).square() / pooled.var.clamp(min=tiny)
    return (0.5 * (ratio - 1 - ratio.log() + shift)).clamp(min=0)


def gaussian_divergence(moments: Moments, priors: Tensor) -> float:
    """Return how far the contexts' statistics have moved apart, in nats; 0 when they are equal.

    `gaussian_divergences`, averaged over channels and, with the priors (K,) or (K, C), over
    contexts.
    """
    weights = widen(priors).reshape(priors.shape[0], -1)
    return float((weights * gaussian_divergences(moments, priors)).sum(0).mean())
