"""The samples in the arguments of a forward: find them, copy what holds them."""

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.util.elements import slots_of

# What lists of numbers are as tensors.
_NUMBERS: dict[Any, torch.dtype] = {int: torch.int64, float: torch.float64}
SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
# What is looked into of an object: one that holds more is no batch.
_MOST_HELD = 1000


def is_list_of_samples(value: Any, samples: int, batches: bool = False) -> bool:
    """Return whether a list holds one entry a sample: images, lengths, or what belongs to each.

    Tensors of as many rows as there are may be batches instead, in whatever holds them; `batches`
    says that they are.
    """
    if not isinstance(value, list | tuple) or len(value) != samples or hasattr(value, "_fields"):
        return False
    if all(type(v) is int for v in value) or all(isinstance(v, str) for v in value):
        return True
    tensors = [tensors_of(v) for v in value]
    if not all(tensors) and not all(isinstance(v, dict) or is_dataclass(v) for v in value):
        return False
    if any(isinstance(v, Tensor) and v.dim() > 3 for v in value):
        return False
    may_be_batches = all(t.shape[:1] == (samples,) for parts in tensors for t in parts)
    return not (batches and may_be_batches)


def parts_of(value: Any) -> dict[Any, Any] | None:
    """Return what an argument is made of, by name; None where it cannot be taken apart."""
    if isinstance(value, dict | UserDict):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value) if hasattr(value, f.name)}
    return None


def tensors_of(value: Any) -> list[Any]:
    """Return the tensors and arrays that any object holds, itself or in what it holds."""
    found: list[Any] = []
    seen: set[int] = set()
    queue = [value]
    while queue and len(seen) < _MOST_HELD:
        part = queue.pop()
        if id(part) in seen or isinstance(part, nn.Module | type | FunctionType | ModuleType):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor) or _is_array(part):
            found.append(part)
        elif isinstance(part, dict | UserDict):
            queue += part.values()
        elif isinstance(part, list | tuple | set):
            queue += part
        else:
            queue += [getattr(part, name) for name in slots_of(part) if hasattr(part, name)]
            queue += getattr(part, "__dict__", {}).values()
    return found


def as_tensors(value: Any) -> Any:
    """Return an array of NumPy, a nested tensor, or a list of arrays or numbers, as tensors.

    Anything else is returned as it is.
    """
    if isinstance(value, list | tuple) and value:
        if all(map(_is_array, value)):
            return [torch.tensor(part, device="cpu") for part in value]
        if all(map(_is_sequence, value)):
            return [
                torch.tensor(part, dtype=_NUMBERS[type(part[0])], device="cpu") for part in value
            ]
    if isinstance(value, Tensor) and value.is_nested:
        return list(value.unbind())
    return torch.tensor(value, device="cpu") if _is_array(value) else value


def _is_sequence(value: Any) -> bool:
    """Return whether a value is a list of numbers of one kind, as the tokens of a sentence."""
    kinds = {type(v) for v in value} if isinstance(value, list) else {None}
    return len(kinds) == 1 and kinds <= _NUMBERS.keys()


def _is_array(value: Any) -> bool:
    found = type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"
    return found and value.dtype.kind in "biufc" and value.dtype.isnative


def vary(values: Any, samples: int, *change: Any) -> Any:
    """Copy the arguments of a call, see `rebuild`; all of them together are no list of samples."""
    return tuple(rebuild(value, samples, *change) for value in values)


def batches_in(values: Any, samples: int, batches: bool = False) -> tuple[list[Any], list[Tensor]]:
    """Return the batches, and the lists of samples, in the arguments of a call; other tensors."""
    found: tuple[list[Any], list[Tensor]] = [], []
    vary(values, samples, noting(found[0]), batches, noting(found[1]))
    return found


def noting(kept: list[Any]) -> Callable[[Any], Any]:
    """Return a function that keeps what it is given, and returns it."""

    def note(value: Any) -> Any:
        kept.append(value)
        return value

    return note


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
        TypeError: a part that cannot be copied, as a generator, or not with other tensors.
    """
    tensors = as_tensors(value)
    if tensors is not value:
        new = rebuild(tensors, samples, change, batches, beside)
        if isinstance(value, Tensor):
            return torch.nested.as_nested_tensor(new, layout=value.layout)
        if isinstance(new, Tensor):
            return new.numpy()
        return type(value)(v.tolist() if isinstance(value[0], list) else v.numpy() for v in new)
    if isinstance(value, Tensor):
        # A sparse square matrix says which samples are neighbours.
        links = value.layout in SPARSE and value.shape[0] == value.shape[-1]
        is_batch = value.dim() > 0 and value.shape[0] == samples and not links
        return (change if is_batch else beside or fresh)(value)
    if is_list_of_samples(value, samples, batches):
        return type(value)(change(value))
    parts = parts_of(value)
    if parts is None:
        if isinstance(value, nn.Module):
            return value
        memo = {id(t): rebuild(t, samples, change, False, beside) for t in tensors_of(value)}
        copied = copy.deepcopy(value, memo.copy())
        if not {id(t) for t in memo.values()}.issuperset(map(id, tensors_of(copied))):
            raise TypeError(f"a {type(value).__name__} copies its tensors in its own way")
        return copied
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
