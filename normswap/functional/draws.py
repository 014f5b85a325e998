"""Random draws of augmentations, by torch's generators, for which the host never waits."""

from typing import Any

import torch
from torch import Tensor


def draw_beta(
    beta: float,
    count: int,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from Beta(beta, beta), (count,) float32."""
    if beta == 1:
        return torch.rand(count, device=device, dtype=torch.float32, generator=generator)
    shape = torch.full((2, count), float(beta), device=device, dtype=torch.float32)
    # The meta device of torch 2.9 has no such operator.
    gamma = shape if shape.is_meta else torch._standard_gamma(shape, generator=generator)
    # Both draws of a small beta can underflow.
    gamma = gamma.clamp(min=torch.finfo(gamma.dtype).tiny)
    return gamma[0] / gamma.sum(0)


def is_captured() -> bool:
    """Return whether eager code is recorded into a CUDA graph on the current stream."""
    if torch.compiler.is_compiling():  # draws on the device, and cannot ask for the stream
        return False
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def draw_permutation(count: int, device: torch.device | None = None) -> Tensor:
    """Draw a permutation, (count,) int64."""
    permutation = torch.randperm(count, device=device)
    if torch.compiler.is_compiling():
        # The same again: Inductor of torch 2.9 fails on what is indexed by torch.randperm.
        return permutation.argsort().argsort()
    return permutation


def draw_partners(count: int, mix: str, device: torch.device | None = None) -> Tensor:
    """Draw a partner for each sample, a permutation, (count,) int64.

    Args:
        count: of samples.
        mix: "random", any sample; or "crossdomain", one of the other half of the batch, whose
            halves are then of two domains.
        device: where to draw.
    """
    if mix == "random":
        return draw_permutation(count, device)
    low = count // 2
    halves = (low + draw_permutation(count - low, device), draw_permutation(low, device))
    return torch.cat(halves)
