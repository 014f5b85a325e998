"""Inputs, statistics and losses, the same in every world."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.graph.fuzz.observe import View


def images(batch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + size)
    return torch.randn(batch, 4, size, size, generator=generator, dtype=torch.float64)


def spread(model: nn.Module, seed: int) -> None:
    """Give every batch norm statistics and an affine of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.weight.copy_(draw(module.weight, 0.5, 1.5))
                module.bias.copy_(draw(module.bias, -0.5, 0.5))
                module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(draw(module.running_var, 0.5, 2))


def differentiable(value: Any) -> list[Tensor]:
    """Return the tensors of an output that a loss can take, each once."""
    view = View()
    view.of(value)
    return [t for t in view.kept if isinstance(t, Tensor) and t.requires_grad]


def weights_like(t: Tensor) -> Tensor:
    return torch.arange(t.numel(), dtype=t.dtype).cos().reshape(t.shape)
