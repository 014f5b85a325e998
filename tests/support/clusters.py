"""Data to cluster."""

import pytest
import torch

from normswap import contexts

METHODS = [contexts.kmeans, contexts.gaussian_mixture]
both = pytest.mark.parametrize("find", METHODS, ids=["kmeans", "gaussian_mixture"])


def blobs(count=600, seed=0, dtype=torch.float32):
    """Three groups of points in four dimensions, far apart, and which is which."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(3, (count,), generator=generator)
    centers = torch.tensor([[0.0, 0, 0, 0], [4, 0, 4, 0], [0, 4, 0, -4]])
    return (centers[group] + torch.randn(count, 4, generator=generator)).to(dtype), group


def batches(x, size=50):
    return list(x.split(size))
