"""Layers without values: the meta device, and what leaving it gives them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def has_no_values(module: nn.Module) -> bool:
    """Return whether a tensor of a module, or of one below it, is on the meta device."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


class Resettable(nn.Module):
    """A layer that is a fresh one where `to_empty` gives it memory, not whatever is there.

    A base's state dict, loaded next, does not hold everything that a layer of ours has.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Apply a function to the layer's tensors; see the class."""
        had_none = has_no_values(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if had_none and not has_no_values(self):
            self._fill()
        return self

    def _fill(self) -> None:
        reset = getattr(self, "reset_parameters", None)
        if reset is not None:
            reset()


def fitting(value: Tensor, like: Tensor, metadata: Any) -> Tensor:
    """Return what is derived from a base's entry, in its dtype where entries are assigned.

    Args:
        value: derived, perhaps in a wider dtype, which a copy into the layer rounds.
        like: the entry of the state dict.
        metadata: the third argument of ``_load_from_state_dict``.
    """
    assigned = (metadata or {}).get("assign_to_params_buffers", False)
    return value.to(like.device, like.dtype) if assigned else value


def counted_nothing(count: Tensor) -> Tensor:
    """Return a count of batches for a base that has none: as it is, zeros without values."""
    return torch.zeros_like(count, device="cpu") if count.is_meta else count
