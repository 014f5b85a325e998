"""What the order of rows may depend on: the kind of a call, and its sizes and numbers."""

import enum
from typing import Any

from torch import Tensor, nn

from normswap.graph.rows.samples import as_tensors, is_list_of_samples, parts_of, tensors_of

_FLAGS, _NUMBERS = {bool, str, type(None)}, {int, float}


def kind_of(module: nn.Module, values: Any, samples: int) -> tuple[Any, Any]:
    """Return the kind of a call, its flags and modes included, and its sizes and numbers."""
    kinds: list[Any] = []
    numbers: list[Any] = []
    for value in values:
        _describe(value, samples, kinds, numbers)
    seen: set[int] = set()
    stack = [module]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        hooks = len(part._forward_hooks), len(part._forward_pre_hooks)
        kinds.append((part.training, *hooks))
        children = part._modules
        if children:
            for value in part.__dict__.values():
                kind = type(value)
                if kind in _FLAGS:
                    kinds.append(value)
                elif kind in _NUMBERS:
                    numbers.append(value)
            stack += [child for child in children.values() if child is not None]
    return tuple(kinds), tuple(numbers)


def _describe(value: Any, samples: int, kinds: list[Any], numbers: list[Any]) -> None:
    """Describe an argument: what it is to `kinds`, its sizes and numbers to `numbers`."""
    value = as_tensors(value)
    if isinstance(value, Tensor):
        batch = value.dim() > 0 and value.shape[0] == samples
        kinds.append((value.dtype, value.dim(), batch))
        numbers.append(value.shape[1:] if batch else value.shape)
    elif value is None or isinstance(value, bool | str | enum.Enum):
        kinds.append(repr(value))
    elif isinstance(value, int | float):
        kinds.append("number")
        numbers.append(value)
    elif is_list_of_samples(value, samples) and isinstance(value[0], str):
        kinds.append("strings")
    elif is_list_of_samples(value, samples) and not isinstance(value[0], int):
        found: list[tuple[list[Any], list[Any]]] = [([], []) for _ in value]
        for part, described in zip(value, found, strict=True):
            _describe(part, samples, *described)
        kinds.append(frozenset(tuple(kind) for kind, _ in found))
        numbers.append(frozenset(tuple(number) for _, number in found))
    else:
        parts = parts_of(value)
        if parts is None:
            parts = dict(enumerate(tensors_of(value)))
        kinds.append((type(value).__qualname__, *map(str, parts)))
        for part in parts.values():
            _describe(part, samples, kinds, numbers)
