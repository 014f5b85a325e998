"""What the order of rows may depend on: the kind of a call, and its sizes and numbers."""

import enum
import functools
from collections.abc import Hashable, Iterable
from dataclasses import is_dataclass
from itertools import islice
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from normswap.functional.backend import is_eager, is_readable
from normswap.functional.draws import is_captured
from normswap.graph.rows.samples import as_tensors, is_list_of_samples, parts_of, tensors_of
from normswap.util.elements import elements_of
from normswap.util.original_class import STATE

_FLAGS, _NUMBERS = {bool, str, type(None)}, {int, float}
# What says all in its representation.
_PLAIN = (bytes, complex, slice, range, torch.dtype, torch.device)
# Of tensors with one value, which may be a setting: no scale, nor a temperature.
_DISCRETE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Modules of classes whose attributes are not looked at, and those where they have no children.
_LIBRARIES = ("normswap.",)
_LAYERS = ("normswap.", "torch.", "torchvision.", "timm.")
# Attributes of every module, which hold no settings.
_OWN = frozenset(vars(nn.Module()))
# Values of an attribute that are looked at: one that holds more is data.
_MOST_VALUES = 100


def kind_of(module: nn.Module, values: Iterable[object], samples: int) -> tuple[Hashable, Hashable]:
    """Return the kind of a call, its flags and modes included, and its sizes and numbers."""
    kinds: list[Hashable] = []
    numbers: list[Hashable] = []
    for value in values:
        _describe(value, samples, kinds, numbers)
    # Every forward looks at every module: what most of them are asked is to be quick.
    parts, seen = [module], {id(module)}
    for part in parts:
        children = part._modules
        for child in children.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                parts.append(child)
        kinds.append((part.training,))
        if part._forward_hooks or part._forward_pre_hooks:
            kinds.append((len(part._forward_hooks), len(part._forward_pre_hooks)))
        # Settings of layers of libraries are no order of samples.
        if not type(part).__module__.startswith(_LIBRARIES if children else _LAYERS):
            for name, value in part.__dict__.items():
                if name in _OWN:
                    continue
                kind = type(value)
                if kind in _FLAGS:
                    kinds.append(value)
                elif kind in _NUMBERS:
                    numbers.append(value)
                elif not name.startswith(STATE):
                    _describe_setting(value, kinds, numbers)
            for name, buffer in part._buffers.items():
                if name != "num_batches_tracked":  # of a norm of the user's
                    _describe_setting(buffer, kinds, numbers)
    return tuple(kinds), tuple(numbers)


def _is_setting(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor of one integer or bool, and it can be seen which."""
    if not isinstance(value, Tensor) or value.dtype not in _DISCRETE or value.numel() != 1:
        return False
    return is_eager() and is_readable(value) and not (value.is_cuda and is_captured())


def _describe_setting(
    value: object,
    kinds: list[Hashable],
    numbers: list[Hashable],
    attributes: bool = False,
) -> None:
    """Describe what a setting holds: flags to `kinds`, numbers to `numbers`.

    So are names, since a list of them may be a record that grows in each call. Attributes of
    objects of any class are looked at if asked for.
    """
    values = [value]
    for part in values:
        kind = type(part)
        if kind in _NUMBERS or kind is str:
            numbers.append(part)
        elif isinstance(part, _PLAIN):
            numbers.append(repr(part))
        elif kind in _FLAGS:
            kinds.append(part)
        elif isinstance(part, enum.Enum | type | CodeType):
            kinds.append(hash(part))  # the number, since code and local classes do not pickle
        elif _is_setting(part):
            values.append(part.item())
        elif len(values) < _MOST_VALUES and not isinstance(part, Tensor | nn.Module):
            values += islice(_held_by(part, attributes), _MOST_VALUES)


def _held_by(value: Any, attributes: bool) -> Iterable[object]:
    """Return what a setting that is made of others is made of."""
    if isinstance(value, list | tuple | dict):
        return elements_of(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, elements_of(value)))
    if isinstance(value, FunctionType | MethodType):
        return (value.__code__,)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return (value.item(),)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if attributes or isinstance(value, SimpleNamespace) or is_dataclass(value):
        found: dict[str, Any] = getattr(value, "__dict__", {})
        return found.values()
    return ()


def _describe(value: Any, samples: int, kinds: list[Hashable], numbers: list[Hashable]) -> None:
    """Describe an argument: what it is to `kinds`, its sizes and numbers to `numbers`."""
    value = as_tensors(value)
    if isinstance(value, Tensor):
        batch = value.dim() > 0 and value.shape[0] == samples
        kinds.append((value.dtype, value.dim(), batch))
        numbers.append(value.shape[1:] if batch else value.shape)
        if not batch:
            _describe_setting(value, kinds, numbers)
    elif value is None or isinstance(value, bool | str | enum.Enum):
        kinds.append(repr(value))
    elif isinstance(value, int | float):
        kinds.append("number")
        numbers.append(value)
    elif is_list_of_samples(value, samples) and isinstance(value[0], str):
        kinds.append("strings")
    elif is_list_of_samples(value, samples) and not isinstance(value[0], int):
        found: list[tuple[list[Hashable], list[Hashable]]] = [([], []) for _ in value]
        for part, described in zip(value, found, strict=True):
            _describe(part, samples, *described)
        kinds.append(frozenset(tuple(kind) for kind, _ in found))
        numbers.append(frozenset(tuple(number) for _, number in found))
    else:
        parts = parts_of(value)
        if parts is None:
            parts = dict(enumerate(tensors_of(value)))
            _describe_setting(value, kinds, numbers, True)
        kinds.append((type(value).__qualname__, *map(str, parts)))
        for part in parts.values():
            _describe(part, samples, kinds, numbers)
