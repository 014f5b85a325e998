"""What eps a frozen batch norm adds to its variance, measured."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def measure_eps(module: nn.Module, fused: tuple[str, ...]) -> float | str:
    """Return the eps of a frozen batch norm, or why it is none.

    A name alone does not tell what a forward computes, and DETR's has its eps written in there: so
    a copy with values of our own is run.
    """
    probe: Any = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    probe._modules.update({name: nn.Identity() for name in fused})
    channels = probe.running_mean.shape[0]
    spread = torch.linspace(0, 1, channels, dtype=torch.float64, device="cpu")
    x = torch.stack([3 * spread - 1, 2 - spread]).view(2, channels, 1, 1)

    def run(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        values = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        for name, value in values.items():
            getattr(probe, name).copy_(value)
        y: Tensor = type(probe).forward(probe, x)
        return y

    zeros, ones = torch.zeros_like(spread), torch.ones_like(spread)
    # Variances down to where eps counts.
    weight, bias, mean, var = spread + 0.5, 2 * spread, 1 - spread, 10 ** (6 * spread - 6)
    try:
        at_zero = float(run(ones, ones, zeros, zeros).flatten()[0])
        y = run(weight, bias, mean, var)
    except Exception as error:
        return f"its forward cannot be run alone ({type(error).__name__}: {error})"
    # There x is -1 and bias 1: y = 1 - 1 / sqrt(eps).
    measured = float(f"{(1 - at_zero) ** -2:.9g}") if at_zero < 1 else torch.nan
    eps = float(getattr(module, "eps", measured))
    centred = x - mean.view(-1, 1, 1)
    expected = centred * (weight / (var + eps).sqrt()).view(-1, 1, 1) + bias.view(-1, 1, 1)
    if y.shape == expected.shape and torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4):
        return eps
    return "its forward is not weight * (x - running_mean) / sqrt(running_var + eps) + bias" + (
        "" if hasattr(module, "eps") else ", and no attribute eps says with which eps"
    )
