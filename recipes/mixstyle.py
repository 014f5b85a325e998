"""MixStyle, a baseline: after early stages, samples take on mixtures of each other's statistics.

With probability p in a training step, ``y = (x - mu) / sigma * sigma' + mu'`` with
``mu' = l mu + (1 - l) mu[perm]``, likewise sigma', per instance and channel; l ~ Beta(alpha, alpha)
a sample, a random permutation of the batch, no gradient through the statistics. Identity in eval.

Source: Zhou, Yang, Qiao, Xiang, "Domain Generalization with MixStyle", ICLR 2021: p = 0.5,
alpha = 0.1, after the first stages of the network; unbiased variance, eps 1e-6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import RecipeError

P, ALPHA, EPS = 0.5, 0.1, 1e-6
STAGES = (4, 8)  # reductions of the stages it follows: in a ResNet, layer1 and layer2


def add_mixstyle(model: nn.Module) -> nn.Module:
    """Put MixStyle after two early stages of a timm model, by forward hooks.

    Raises:
        RecipeError: the model does not say which its stages are.
    """
    stages = [i["module"] for i in getattr(model, "feature_info", ()) if i["reduction"] in STAGES]
    if not stages:
        raise RecipeError(
            f"expected a timm model with stages of reduction {STAGES} for mixstyle, got "
            f"{type(model).__name__}; leave mixstyle out of --methods"
        )
    for name in stages:
        model.get_submodule(name).register_forward_hook(_mix)
    return model


def mix_style(x: Tensor, mixing: Tensor, permutation: Tensor) -> Tensor:
    """Give instances mixed statistics.

    Args:
        x: (N, C, H, W).
        mixing: (N,) in [0, 1], the share of an instance's own statistics.
        permutation: (N,) int64, whose statistics the rest is.
    """
    variance, mean = torch.var_mean(x.detach(), (2, 3), keepdim=True)
    sigma = (variance + EPS).sqrt()
    share = mixing.view(-1, 1, 1, 1)
    new_mean = share * mean + (1 - share) * mean[permutation]
    new_sigma = share * sigma + (1 - share) * sigma[permutation]
    return (x - mean) / sigma * new_sigma + new_mean


def _mix(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    if not module.training or torch.rand(()).item() >= P:
        return None
    mixing = torch.distributions.Beta(ALPHA, ALPHA).sample((len(output),)).to(output)
    return mix_style(output, mixing, torch.randperm(len(output), device=output.device))
