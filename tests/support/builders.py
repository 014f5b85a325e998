"""Layers with random parameters, batches whose contexts differ, and one way to compare."""

import torch
from torch import Tensor, nn

import normswap
from normswap.testing.models import random_
from tests.support.oracles import Running

SKEWED = [0.7, 0.2, 0.1]
SHAPES = [(7, 4), (7, 4, 5), (7, 4, 3, 5), (7, 4, 2, 3, 2)]
POLICIES = ["pooled", "posterior", 1]


def make_batch(
    shape: tuple[int, ...], seed: int = 0, offset: float = 0.5, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return a batch whose samples and channels differ in mean and in spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = torch.arange(shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    channels = torch.arange(shape[1], dtype=torch.float64).reshape(1, -1, *[1] * (len(shape) - 2))
    return (x * (1 + 0.2 * channels) + offset * channels + 0.1 * rows).to(dtype)


def make_cn(
    num_features: int = 4,
    num_contexts: int = 3,
    priors: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
    **settings: object,
) -> normswap.ContextNorm:
    given = None if priors is None else torch.tensor(priors, dtype=torch.float64)
    layer = normswap.ContextNorm(num_features, num_contexts, priors=given, dtype=dtype, **settings)
    random_(layer.weight, 1, 0.5, 1.5)
    random_(layer.bias, 2, -1, 1)
    random_(layer.running_mean, 3, -1, 1)
    random_(layer.running_var, 4, 0.5, 2)
    return layer


def make_cnx(
    num_features: int = 4,
    num_contexts: int = 3,
    priors: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
    **settings: object,
) -> normswap.ContextNormX:
    given = None if priors is None else torch.tensor(priors, dtype=torch.float64)
    layer = normswap.ContextNormX(num_features, num_contexts, priors=given, dtype=dtype, **settings)
    layer.fresh = False
    if layer.affine:
        random_(layer.weight, 1, 0.5, 1.5)
        random_(layer.bias, 2, -1, 1)
    random_(layer.mu, 3, -1, 1)
    random_(layer.log_sigma, 4, -0.5, 0.5)
    return layer


def make_instance(
    num_features: int = 4,
    num_contexts: int = 3,
    priors: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
    **settings: object,
) -> normswap.ContextInstanceNorm:
    given = None if priors is None else torch.tensor(priors, dtype=torch.float64)
    layer = normswap.ContextInstanceNorm(
        num_features, num_contexts, priors=given, dtype=dtype, **settings
    )
    random_(layer.weight, 1, 0.5, 1.5)
    random_(layer.bias, 2, -1, 1)
    return layer


MAKERS = {"cn": make_cn, "cn-x": make_cnx, "instance": make_instance}


def running_of(layer: normswap.ContextNorm) -> Running:
    return Running(
        layer.running_mean.double().clone(),
        layer.running_var.double().clone(),
        layer.num_batches_tracked.tolist(),
    )


def trained_norm(
    kind: str = "BatchNorm2d", channels: int = 4, dtype: torch.dtype = torch.float32, **settings
) -> nn.Module:
    """Return a torch norm in eval mode with random parameters and statistics."""
    norm = getattr(nn, kind)(channels, dtype=dtype, **settings).eval()
    for seed, (name, tensor) in enumerate(norm.state_dict().items()):
        if name == "num_batches_tracked":
            tensor.fill_(5)
        else:
            low, high = (-1, 1) if name in ("bias", "running_mean") else (0.5, 2)
            random_(tensor, 10 + seed, low, high)
    return norm


def assert_close(actual: Tensor, expected: Tensor, share: float = 1e-11) -> None:
    """Compare in float64; `share` of the largest reference value, by default double rounding."""
    assert actual.shape == expected.shape
    bound = share * max(float(expected.detach().abs().max()), 1.0)
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert error <= bound, f"differs by {error:.3g}, allowed {bound:.3g}"
