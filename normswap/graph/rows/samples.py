"""The samples in the arguments of a forward: copy them, exchange some of them."""

import copy
import copyreg
from collections import UserDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# How a sample is changed, in this order: each reaches what the one before it may have missed.
HOWS = ("others", "shuffle", "noise")
_MOST_OTHERS = 3
# What is looked into of an object: one that holds more is no batch.
_MOST_HELD = 1000


def is_list_of_samples(value: Any, samples: int, batches: bool = False) -> bool:
    """Return whether a list holds one entry a sample: images, lengths, or what belongs to each.

    Tensors of as many rows as there are may be batches instead; `batches` says that they are.
    """
    if not isinstance(value, list | tuple) or len(value) != samples or hasattr(value, "_fields"):
        return False
    if all(type(v) is int for v in value):
        return True
    if all(isinstance(v, Tensor) for v in value):
        may_be_batches = all(v.dim() > 0 and len(v) == samples for v in value)
        return all(v.dim() <= 3 for v in value) and not (batches and may_be_batches)
    return all(isinstance(v, dict) or is_dataclass(v) for v in value)


def parts_of(value: Any) -> dict[Any, Any] | None:
    """Return what an argument is made of, by name; None where it cannot be taken apart."""
    if isinstance(value, dict | UserDict):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value) if hasattr(value, f.name)}
    return None


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors that an object of any class holds, itself or in what it holds."""
    found: list[Tensor] = []
    seen: set[int] = set()
    queue = [value]
    while queue and len(seen) < _MOST_HELD:
        part = queue.pop()
        if id(part) in seen or isinstance(part, nn.Module | type | FunctionType | ModuleType):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, dict | UserDict):
            queue += part.values()
        elif isinstance(part, list | tuple | set):
            queue += part
        else:
            slots = copyreg._slotnames(type(part))  # type: ignore[attr-defined]
            queue += [getattr(part, name) for name in slots if hasattr(part, name)]
            queue += getattr(part, "__dict__", {}).values()
    return found


def as_tensors(value: Any) -> Any:
    """Return an array of NumPy, or a list of them, as tensors; anything else as it is."""
    if isinstance(value, list | tuple) and value and all(map(_is_array, value)):
        return [torch.tensor(part) for part in value]
    return torch.tensor(value) if _is_array(value) else value


def _is_array(value: Any) -> bool:
    found = type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"
    return found and value.dtype.kind in "biufc" and value.dtype.isnative


def vary(values: Any, samples: int, *change: Any) -> Any:
    """Copy the arguments of a call, see `rebuild`; all of them together are no list of samples."""
    return tuple(rebuild(value, samples, *change) for value in values)


def batches_in(values: Any, samples: int, batches: bool = False) -> tuple[list[Any], list[Tensor]]:
    """Return the batches, and the lists of samples, in the arguments of a call; other tensors."""

    def noting(kept: list[Any]) -> Callable[[Any], Any]:
        def note(value: Any) -> Any:
            kept.append(value)
            return value

        return note

    found: tuple[list[Any], list[Tensor]] = [], []
    vary(values, samples, noting(found[0]), batches, noting(found[1]))
    return found


def rebuild(
    value: Any,
    samples: int,
    change: Callable[[Any], Any],
    batches: bool = False,
    beside: Callable[[Any], Any] | None = None,
) -> Any:
    """Copy an argument, with `change(batch)` for each tensor (N, ...) and list of N samples.

    What may be such a list or several batches is the latter if `batches`. Other tensors are what
    `beside` makes of them.

    Raises:
        TypeError: a part that cannot be copied, as an iterator.
    """
    tensors = as_tensors(value)
    if tensors is not value:
        new = rebuild(tensors, samples, change, batches, beside)
        return new.numpy() if isinstance(new, Tensor) else type(value)(v.numpy() for v in new)
    if isinstance(value, Tensor):
        is_batch = value.dim() > 0 and value.shape[0] == samples
        return (change if is_batch else beside or fresh)(value)
    if is_list_of_samples(value, samples, batches):
        return type(value)(change(value))
    parts = parts_of(value)
    if parts is None:
        if isinstance(value, nn.Module):
            return value
        memo = {id(t): rebuild(t, samples, change, False, beside) for t in tensors_of(value)}
        return copy.deepcopy(value, memo)
    new = {key: rebuild(part, samples, change, batches, beside) for key, part in parts.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
        )
    clone: Any = copy.copy(value)
    for key, part in new.items():
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
    clone = value.detach().clone().requires_grad_(value.requires_grad)
    # A leaf could not be changed in place.
    return clone.clone() if value.requires_grad and torch.is_grad_enabled() else clone


def rolled(batch: Any) -> Any:
    """Return the batch with its last sample first; a single number as another one."""
    if not isinstance(batch, Tensor):
        return fresh([*batch[-1:], *batch[:-1]])
    return fresh(batch.roll(1, 0)) if batch.dim() else ended(batch.reshape(1), 0).reshape(())


def ended(batch: Any, at: int) -> Any:
    """Return the batch with a sample that ends earlier, by its length, mask or padding.

    Of numbers that may tell kinds, a zero becomes one: order goes by kind, too.
    """
    if not isinstance(batch, Tensor):
        new = fresh([*batch])
        if isinstance(new[0], int):
            return ended(torch.tensor(new), at).tolist()
        if isinstance(new[at], Tensor) and new[at].dim() and len(new[at]) > 1:
            new[at] = new[at][:-1]
        return new
    values = batch.detach().clone()
    one = values[at]
    if one.dim() and one.dtype != torch.bool:
        # Time may be the first or the last dimension of a sample.
        one[1:], one[..., 1:] = 0, 0
    elif one.dtype == torch.bool:
        (one[..., -1:] if one.dim() else one).logical_not_()
    else:
        one.copy_(torch.where(one == 0, 1, one / 2))
    return fresh(values.requires_grad_(batch.requires_grad))


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
    if isinstance(batch, Tensor) and batch.is_complex():
        return torch.view_as_complex(exchange(torch.view_as_real(batch), picked, how, generator))
    values = [part.detach() for part in batch]
    new = [part.clone() for part in values]
    for i in picked:
        if how == "others":
            for step in range(1, min(len(values), _MOST_OTHERS + 1)):
                other = values[(i + step) % len(values)]
                if other.shape == new[i].shape:
                    new[i] = torch.where(new[i] == values[i], other, new[i])
        elif how == "shuffle":
            order = torch.randperm(new[i].numel(), generator=generator).to(new[i].device)
            new[i] = values[i].flatten()[order].view(values[i].shape)
        elif new[i].numel():
            new[i] = _noise(values, values[i], generator)
    if not isinstance(batch, Tensor):
        return new
    # In the memory format of the batch.
    return torch.empty_like(batch.detach()).copy_(torch.stack(new))


def _noise(batch: list[Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Return values drawn between the least and the largest of a batch."""
    values = torch.cat([part.flatten() for part in batch]).cpu().double()
    values = values[values.isfinite()]
    low, high = map(float, values.aminmax()) if values.numel() else (0.0, 0.0)
    draw = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    if like.is_floating_point():
        return (low + (high - low or 1.0) * draw).to(like)
    return (low + (high - low + 1) * draw).floor().clamp(max=high).to(like)
