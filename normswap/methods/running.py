"""Running statistics of a layer: how they start, are copied from a norm, and move."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.functional.recomputation import in_backward

RUNNING = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


class RunningStats(nn.Module):
    """A layer that may keep running statistics, buffers as torch's norms name them."""

    track_running_stats = True
    momentum: float | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def add_running(
        self, shape: tuple[int, ...], counts: tuple[int, ...], placed: dict[str, Any]
    ) -> None:
        """Register running statistics, None where they are not tracked."""
        counter = (counts, {**placed, "dtype": torch.int64})
        for name in RUNNING:
            size, options = counter if name == "num_batches_tracked" else (shape, placed)
            tracked = torch.zeros(size, **options) if self.track_running_stats else None
            self.register_buffer(name, tracked)

    def reset_running_stats(self) -> None:
        """Set zero mean, unit variance and no batches, where there are running statistics."""
        for name, value in RUNNING.items():
            if (buffer := self._buffers.get(name)) is not None:
                buffer.fill_(value)

    def keeps_stats(self) -> bool:
        """Return whether this forward leaves the running statistics, whatever the mode.

        Backward runs it again, or tracking was switched off for a while, as code of virtual
        adversarial training does.
        """
        return in_backward() or not self.track_running_stats

    @torch.no_grad()
    def take_running(self, norm: nn.Module) -> None:
        """Copy the running statistics of the norm that is replaced, as far as both have them."""
        for name in RUNNING:
            own, given = self._buffers.get(name), getattr(norm, name, None)
            if own is not None and given is not None:
                own.copy_(given)

    def running_rate(self, dtype: torch.dtype) -> Any:
        """Return the weight of the new value: the momentum, or one over the batches so far."""
        if self.momentum is not None or self.num_batches_tracked is None:
            return self.momentum
        return self.num_batches_tracked.clamp(min=1).to(dtype).reciprocal().unsqueeze(-1)

    @torch.no_grad()
    def move_running(self, mean: Tensor, var: Tensor, rate: float | Tensor) -> None:
        """Move running mean and variance by a rate, in the dtype of what they move towards."""
        for buffer, new in ((self.running_mean, mean), (self.running_var, var)):
            assert buffer is not None
            if buffer.dtype == new.dtype:
                buffer.lerp_(new, rate)
            else:
                buffer.copy_(torch.lerp(buffer.to(new.dtype), new, rate))
