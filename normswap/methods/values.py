"""Values of layers: the settings they are made with, and what leaving the meta device gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.arguments import check_flag, check_number, describe
from normswap.errors import ContextError


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


def _holds_numbers(t: Tensor) -> bool:
    return not (t.is_nested or t.is_meta or t.is_complex()) and t.layout == torch.strided


def check_settings(eps: Any, momentum: Any = None, flags: dict[str, Any] | None = None) -> None:
    """Check what layers take beside their sizes.

    Raises:
        ContextError: eps below 0, momentum neither None nor in [0, 1], or a flag that is no bool.
    """
    check_number("eps", eps, 0, error=ContextError)
    if momentum is not None:
        check_number("momentum", momentum, 0, 1, error=ContextError)
    for name, value in (flags or {}).items():
        check_flag(name, value, ContextError)


def make_priors(
    priors: Tensor | None,
    num_contexts: int,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return lambda for a layer, (K,): uniform by default; float64 only in a float64 layer.

    Raises:
        ContextError: not K positive values that sum to one.
    """
    wide = (dtype or torch.get_default_dtype()) == torch.float64
    if priors is None:
        priors = torch.full((num_contexts,), 1 / num_contexts, dtype=torch.float64, device="cpu")
    elif not isinstance(priors, Tensor) or not _holds_numbers(priors):
        raise ContextError(
            f"expected `priors` as a tensor of {num_contexts} numbers, got {describe(priors)}"
        )
    elif (
        priors.shape != (num_contexts,)
        or not bool((priors > 0).all())
        or abs(float(priors.double().sum()) - 1) > 1e-3
    ):
        raise ContextError(
            f"expected `priors` of {num_contexts} positive values that sum to one, "
            f"got {describe(priors.tolist())}; normswap.contexts.check_priors scales counts"
        )
    # A copy: layers of a float64 model would share one tensor with each other and the caller.
    return priors.to(device=device, dtype=torch.float64 if wide else torch.float32, copy=True)
