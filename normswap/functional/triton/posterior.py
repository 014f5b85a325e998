"""The maps of samples without a label that weigh the contexts: rows of their own in the tables."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.moments import Moments
from normswap.functional.triton import posterior_kernels
from normswap.functional.triton.cn_formula import Norm
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import cut_contexts, plan


class Posterior(NamedTuple):
    """How the samples weigh the contexts; see `normswap.functional.moments.context_posterior`.

    Attributes:
        weights: (N, K), of samples without a label.
        known: moments of the contexts, (K, C) float32, that the samples were compared with.
    """

    weights: Tensor
    known: Moments


def weigh(
    x: Tensor,
    parts: Moments,
    index: Tensor | None,
    known: Moments,
    norm: Norm,
    rows: Sequence[Tensor],
) -> Posterior:
    """Write the maps of samples without a label, from the moments of their parts.

    Args:
        x: (N, C, *).
        parts: moments, (N, S, C), as of `sweeps.part_stats`.
        index: (N,), below K that of a context, which has its row; None for no labels at all.
        known: see `Posterior`.
        norm: the layer.
        rows: centre, scale and shift, (K + N, C), to be written from row K on.
    """
    p, (contexts, channels) = plan(x), known.mean.shape
    weights = x.new_empty(len(x), contexts, dtype=torch.float32)
    step = 0 if index is None else index.stride(0)
    launch(
        posterior_kernels.weigh,
        len(x),
        *parts,
        *(index, step, *known, *norm.affine, *rows, weights, norm.eps),
        *(contexts, channels, p.shape[2], p.splits, p.part),
        **cut_contexts(contexts, channels),
    )
    return Posterior(weights, known)


def pull_weights(
    x: Tensor,
    dots: tuple[Tensor, Tensor],
    index: Tensor,
    found: Posterior,
    norm: Norm,
    centre: Tensor,
    pulled: tuple[Tensor, Tensor],
) -> None:
    """Write the rows of spread and constant, (K + N, C), of samples without a label.

    Given ``sum dy`` and ``sum dy * (x - centre)`` of parts, (N, S, C); for others see `weigh`.
    """
    p, (contexts, channels) = plan(x), found.known.mean.shape
    launch(
        posterior_kernels.pull_weights,
        len(x),
        *dots,
        *(index, index.stride(0), *found.known, *norm.affine),
        *(centre, found.weights, *pulled, norm.eps),
        *(contexts, channels, p.shape[2], p.splits),
        **cut_contexts(contexts, channels),
    )
