"""What was changed of a norm, or of its class, that no replacement can follow."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.util.arguments import describe

STATISTICS = ("running_mean", "running_var")
TENSORS = ("weight", "bias", *STATISTICS)
# What a layer does besides its forward, and what torch's forward reads of it.
_METHODS = {"__call__", "_call_impl", "__getattr__", "__getattribute__", "train", "eval"}
_READ = {"training", "eps", "momentum", "weight", "bias", "running_mean", "running_var"}
_READ |= {"num_batches_tracked", "track_running_stats"}


def qualified(cls: type) -> str:
    """Return the full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_torchs(function: Any) -> bool:
    """Return whether a function or class is of `torch.nn`."""
    return str(function.__module__).startswith("torch.nn.")


def changed_by(cls: type) -> str:
    """Say what a subclass of torch's norms changes although its forward is torch's, or "".

    One that stays in eval mode, or computes its momentum, is another norm in training.
    """
    for base in cls.__mro__:
        if is_torchs(base) or base is object:
            continue
        for name, value in vars(base).items():
            if name in _METHODS:
                return f"{qualified(base)} overrides {name}, which may change what it computes"
            if name in _READ and hasattr(value, "__set__"):
                return f"{qualified(base)} computes its {name} by a property"
    return ""


def computed_tensor(module: nn.Module, names: Iterable[str]) -> str:
    """Return the first of these that hooks compute before each forward, as pruning does, or ""."""
    return next((name for name in names if isinstance(vars(module).get(name), Tensor)), "")


def parametrized(module: nn.Module) -> dict[str, nn.Module]:
    """Return what computes tensors of a module whenever they are read, by their names."""
    computed = module._modules.get("parametrizations")
    return {} if computed is None else dict(computed.named_children())


def sources_of(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameter of a name, or those that it is computed from."""
    own = module._parameters.get(name)
    own = module._parameters.get(f"{name}_orig") if own is None else own  # pruned
    if own is not None:
        return [own]
    part = parametrized(module).get(name)
    return [] if part is None else list(part.parameters())


def norm_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors by which torch's norms compute, those that there are."""
    found = ((name, getattr(module, name, None)) for name in TENSORS)
    return {name: t for name, t in found if isinstance(t, Tensor)}


def odd_tensor(tensors: dict[str, Tensor]) -> str:
    """Return what is unusual of the tensors of a norm, which may have been set by hand, or ""."""
    if ("running_mean" in tensors) != ("running_var" in tensors):
        return "it has one of running_mean and running_var without the other"
    first = next(iter(tensors.values()), None)
    for name, t in tensors.items():
        usual = t.dim() == 1 and t.layout == torch.strided and t.is_floating_point()
        if not usual or first is None or (t.shape, t.device) != (first.shape, first.device):
            return (
                f"its {name} is {describe(t)} on {t.device}; expected floating-point tensors of "
                "one shape (C,) on one device"
            )
    return ""


def is_quantised(tensor: Tensor) -> bool:
    """Return whether a tensor is of a class of torchao, whose bits nothing here reads."""
    return type(tensor).__module__.startswith("torchao.")
