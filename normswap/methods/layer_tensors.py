"""Values of layers: settings, priors, what leaving the meta device and a base's entries give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.functional import pad

from normswap.errors import ContextError, ConversionError, InputError, NormswapError
from normswap.functional.backend import is_scripted
from normswap.functional.kernels import is_channels_last
from normswap.util.arguments import check_flag, check_number, describe
from normswap.util.original_class import ORIGINAL


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


class WithPriors(Resettable):
    """A layer with lambda, (K,), a setting: its values are known on the meta device too."""

    priors: Tensor
    kept_priors: Tensor | None = None  # their values, while they are on the meta device
    num_contexts: int
    answering: int | None = None  # how many contexts answer for unknown labels, where not all

    def add_priors(
        self, priors: Tensor | None, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        """Register lambda: uniform by default; float64 only in a float64 layer.

        Raises:
            ContextError: not K positive values that sum to one.
        """
        count = self.num_contexts
        wide = torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else None
        if priors is None:
            priors = torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")
        elif not isinstance(priors, Tensor) or not _holds_numbers(priors):
            raise ContextError(
                f"expected `priors` as a tensor of {count} numbers, got {describe(priors)}"
            )
        total = float(priors.cpu().double().sum())
        if priors.shape != (count,) or not bool((priors > 0).all()) or abs(total - 1) > 1e-3:
            raise ContextError(
                f"expected `priors` of {count} positive values that sum to one, "
                f"got {describe(priors.tolist())}; normswap.contexts.check_priors scales counts"
            )
        # A copy: layers of a float64 model would share one tensor with each other and the caller.
        values = priors.to("cpu", wide or torch.float32, copy=True)
        self.register_buffer("priors", values.to(device or torch.get_default_device()))
        self.kept_priors = values if self.priors.is_meta else None

    def known_priors(self) -> Tensor:
        """Return lambda, with its values."""
        kept = self.kept_priors
        return self.priors if kept is None or not self.priors.is_meta else kept

    def load_priors(self, state: dict[str, Any], prefix: str, like: Tensor | None) -> None:
        """Complete the state dict of a base, which has no lambda, in place.

        Where entries are assigned, lambda has to be on the device of one `like` it.
        """
        if not isinstance(state.get(prefix + "priors"), Tensor):
            known = self.known_priors()
            state[prefix + "priors"] = known if like is None else known.to(like.device)

    def mixing(self, dtype: torch.dtype) -> Tensor:
        """Return lambda, (K,), summing to one again; 0 where a context answers no unknown labels.

        Both a cast and `add_context` change the sum.
        """
        priors = self.priors.to(dtype)
        if self.answering is not None:
            priors = pad(priors[: self.answering], (0, self.num_contexts - self.answering))
        return priors / priors.sum()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        known = self.known_priors()
        super()._apply(fn, recurse)
        kept = self.priors.is_meta and not known.is_meta
        self.kept_priors = known.detach().cpu() if kept else None
        return self

    def _fill(self) -> None:
        if self.kept_priors is not None:
            self.priors.copy_(self.kept_priors)
        super()._fill()


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


def fitting(value: Tensor, like: Tensor, metadata: Any = None) -> Tensor:
    """Return what is derived from an entry of a base, in its dtype where entries are assigned.

    Elsewhere a copy into the layer rounds a wider one. `metadata` is the third argument of
    ``_load_from_state_dict``.
    """
    assigned = (metadata or {}).get("assign_to_params_buffers", False)
    return value.to(like.device, like.dtype) if assigned else value


def counted_nothing(count: Tensor) -> Tensor:
    """Return a count of batches for a base that has none: as it is, zeros without values."""
    return torch.zeros_like(count, device="cpu") if count.is_meta else count


def load_shared(
    state: dict[str, Any], prefix: str, targets: dict[str, Tensor], scales: dict[str, Tensor]
) -> None:
    """Broadcast entries of a base's state dict, (C,) or (), to one row per context, in place.

    `targets` are this layer's tensors by name, (K, *base shape); `scales` a factor per context for
    some of them, (K, 1).
    """
    for name, target in targets.items():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape == target.shape[1:]:
            value = value.unsqueeze(0).expand(target.shape).clone()
            state[prefix + name] = value * scales[name].to(value) if name in scales else value


def holds_base(layer: Any, state: dict[str, Any], prefix: str) -> bool:
    """Return whether a state dict has all entries of a base norm, as that which a layer replaced.

    A part of the layer's own entries, such as its buffers alone, is no base's.
    """
    mean, var = (state.get(f"{prefix}running_{name}") for name in ("mean", "var"))
    if prefix + "priors" in state or not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
        return False
    original = vars(layer).get(ORIGINAL)
    known = {} if original is None else original.parameters | original.buffers
    had = [name for name in ("weight", "bias") if known.get(name) is not None]
    return mean.shape == (layer.num_features,) and all(prefix + name in state for name in had)


def fill_affine(layer: Any, state: dict[str, Any], prefix: str) -> bool:
    """Complete the entries of a base norm without weight or bias; return whether there are any."""
    found = holds_base(layer, state, prefix)
    if found:
        mean = state[prefix + "running_mean"]
        state.setdefault(prefix + "weight", torch.ones_like(mean))
        state.setdefault(prefix + "bias", torch.zeros_like(mean))
    return found


def check_own(layer: nn.Module, *names: str) -> None:
    """Raise where a parameter is computed from others, so that what is written to it is lost."""
    for name in names:
        if name not in layer._parameters:
            raise ConversionError(
                f"expected {getattr(layer, 'site', '') or type(layer).__name__}.{name} as a "
                "parameter, got one that is computed from others, which cannot be set; remove its "
                "pruning or parametrization first"
            )


def check_input(
    x: Tensor, where: str, channels: int | None = None, error: type[NormswapError] = InputError
) -> None:
    """Raise unless an input is (N, C, *), of so many channels if that is known, and of floats.

    Results have its dtype, and integers would be cut off.
    """
    fits = x.dim() > 1 and (channels is None or x.shape[1] == channels)
    if not fits or not x.is_floating_point():
        size = "C" if channels is None else channels
        raise error(
            f"expected input (N, {size}, *) at {where}, got {tuple(x.shape)} of {x.dtype}; "
            "values are floating-point, channels are dimension 1"
        )


def lay_out(x: Tensor) -> Tensor:
    """Return an input as batch norm lays out what it returns: contiguous, or channels last.

    What follows may draw a mask, or take a view, by the order in memory.
    """
    if torch.compiler.is_compiling():
        return x  # the compiler lays out what it computes
    unordered = torch._C._functorch.is_functorch_wrapped_tensor(x) or x.layout != torch.strided
    if unordered or x.is_contiguous() or is_channels_last(x):
        return x
    if is_scripted():  # where torch's function refuses sizes
        return x.contiguous()
    return x.contiguous(memory_format=suggest_memory_format(x))
