"""The samples in the arguments of a forward: describe them, copy them, exchange some of them."""

import copy
import enum
from collections import UserDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

# How a sample is changed, in this order: each reaches what the one before it may have missed.
HOWS = ("others", "shuffle", "noise")
_MOST_OTHERS = 3


def is_list_of_samples(value: Any, samples: int) -> bool:
    """Return whether a list holds one entry a sample: images, or what belongs to each of them."""
    if not isinstance(value, list | tuple) or len(value) != samples or hasattr(value, "_fields"):
        return False
    if all(isinstance(v, Tensor) for v in value):
        return all(v.dim() <= 3 for v in value)
    return all(isinstance(v, dict) or is_dataclass(v) for v in value)


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return what an argument is made of, by name; None where it cannot be taken apart."""
    if isinstance(value, dict | UserDict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value) if hasattr(value, f.name)]
    return None


def describe_arguments(value: Any, samples: int, kinds: list[Any], numbers: list[Any]) -> None:
    """Describe an argument: what it is to `kinds`, its sizes and numbers to `numbers`."""
    if isinstance(value, Tensor):
        batch = value.dim() > 0 and value.shape[0] == samples
        kinds.append((value.dtype, value.dim(), batch))
        numbers.append(value.shape[1:] if batch else value.shape)
    elif value is None or isinstance(value, bool | str | enum.Enum):
        kinds.append(str(value) if isinstance(value, str | enum.Enum) else value)
    elif isinstance(value, int | float):
        kinds.append("number")
        numbers.append(value)
    elif (parts := _parts(value)) is None:
        kinds.append(type(value).__qualname__)
    elif is_list_of_samples(value, samples):
        found = set()
        for _, part in parts:
            described: tuple[list[Any], list[Any]] = ([], [])
            describe_arguments(part, samples, *described)
            found.add(tuple(map(tuple, described)))
        kinds.append(frozenset(kind for kind, _ in found))
        numbers.append(frozenset(number for _, number in found))
    else:
        kinds.append((type(value).__qualname__, tuple(str(key) for key, _ in parts)))
        for _, part in parts:
            describe_arguments(part, samples, kinds, numbers)


def rebuild(value: Any, samples: int, change: Callable[[Any], Any]) -> Any:
    """Copy an argument, with `change(batch)` for each tensor (N, ...) and list of N samples.

    Raises:
        TypeError: a part that cannot be copied, as an iterator.
    """
    if isinstance(value, Tensor):
        batch = value.dim() > 0 and value.shape[0] == samples
        return change(value) if batch else fresh(value)
    if isinstance(value, nn.Module):
        return value
    parts = _parts(value)
    if parts is None:
        return copy.deepcopy(value)
    if is_list_of_samples(value, samples):
        return type(value)(change(value))
    new = [rebuild(part, samples, change) for _, part in parts]
    if isinstance(value, list | tuple):
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    clone: Any = copy.copy(value)
    for (key, _), part in zip(parts, new, strict=True):
        if isinstance(value, dict | UserDict):
            clone[key] = part
        else:
            object.__setattr__(clone, key, part)
    return clone


def fresh(value: Any) -> Any:
    """Return a copy that a forward may change, and that asks for gradients where this does."""
    if not isinstance(value, Tensor):
        # No batch is of size -1: this copies everything.
        return rebuild(value, -1, fresh)
    clone = value.detach().clone()
    if value.requires_grad:
        clone.requires_grad_()
        # A leaf could not be changed in place.
        return clone.clone() if torch.is_grad_enabled() else clone
    return clone


def copied(batch: Any) -> Any:
    """Return a copy of a batch."""
    return fresh(batch) if isinstance(batch, Tensor) else [fresh(part) for part in batch]


def first(count: int) -> Callable[[Any], Any]:
    """Return what takes the first samples of a batch."""
    return lambda batch: copied(batch[:count])


def rolled(batch: Any) -> Any:
    """Return the batch with its last sample first."""
    if isinstance(batch, Tensor):
        return fresh(batch.roll(1, 0))
    return copied([*batch[-1:], *batch[:-1]])


def is_content(batch: Any, least: int) -> bool:
    """Return whether a batch can be changed: not a flag, a length or what goes with an image."""
    if isinstance(batch, Tensor):
        return batch.dim() >= least and batch.dtype != torch.bool
    return all(isinstance(part, Tensor) for part in batch)


@torch.no_grad()
def exchange(batch: Any, picked: list[int], how: str, generator: torch.Generator) -> Any:
    """Return a batch whose picked samples are changed, their values staying in its range.

    Args:
        batch: a tensor (N, ...) or N tensors.
        picked: indices of the samples.
        how: "others": at each place the value another sample has there; "shuffle": a sample's own
            elements in another order; "noise": values between the least and the largest.
        generator: what they are drawn from.
    """
    plain = [part.detach() for part in batch]
    new = [part.clone() for part in plain]
    for i in picked:
        if how == "others":
            for step in range(1, min(len(plain), _MOST_OTHERS + 1)):
                other = plain[(i + step) % len(plain)]
                if other.shape == new[i].shape:
                    new[i] = torch.where(new[i] == plain[i], other, new[i])
        elif how == "shuffle":
            order = torch.randperm(new[i].numel(), generator=generator).to(new[i].device)
            new[i] = plain[i].flatten()[order].view(plain[i].shape)
        else:
            new[i] = _noise(plain, i, generator)
    if not isinstance(batch, Tensor):
        return new
    # In the memory format of the batch.
    return torch.empty_like(batch.detach()).copy_(torch.stack(new))


def _noise(batch: list[Tensor], index: int, generator: torch.Generator) -> Tensor:
    """Return values drawn between the least and the largest of a batch, none as before."""
    like = batch[index]
    if not like.dtype.is_floating_point and not like.numel():
        return like.clone()
    values = torch.cat([part.flatten() for part in batch])
    if like.is_floating_point():
        values = values[values.isfinite()]
        low, high = values.aminmax() if values.numel() else (like.new_zeros(()),) * 2
        spread = torch.where(high > low, high - low, 1.0)
        draw = torch.rand(like.shape, generator=generator).to(like)
        return (low + spread * draw).to(like.dtype)
    if like.is_complex():
        return like * torch.rand(like.shape, generator=generator).to(like.device)
    least, size = int(values.min()), int(values.max() - values.min()) + 1
    if size == 1:
        return like.clone()
    step = torch.randint(1, size, like.shape, generator=generator).to(like)
    return least + (like - least + step).remainder(size)
