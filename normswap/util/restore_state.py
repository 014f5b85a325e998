"""Put a model's state back after runs that must leave no trace."""

import copy
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Of a module's own table: what holds modules and parameters, and what this package keeps there.
_LEFT_ALONE = ("_modules", "_parameters", "_normswap", "_normswap_record", "scope", "training")

_COLLECTIONS = (list, OrderedDict, dict, set, deque)


class Dice(NamedTuple):
    """A generator of random numbers: what reads its state, what sets it, what starts it anew."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    seed: Callable[[int], Any]


def remember(module: nn.Module, slots: Iterable[Any] = ()) -> Callable[..., bool]:
    """Return what puts buffers, plain attributes and the random states back as they are now.

    Attributes are put back by reference, collections and plain objects with what they hold,
    tensors with their values, generators with their states; so are the generators of Python,
    NumPy and torch that the whole program shares. What is returned says, each time it is called,
    whether any of them had moved; given a seed, it starts them from that.

    Args:
        module: the model, or a part of one.
        slots: names outside of it, each with ``read()`` and ``write(value)``.
    """
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    dice = [
        Dice(random.getstate, random.setstate, random.seed),
        Dice(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed),
    ]
    # NumPy is no dependency: only where the program has imported it.
    if numpy := sys.modules.get("numpy.random"):
        dice.append(Dice(numpy.get_state, numpy.set_state, numpy.seed))
    for part in module.modules():
        table = vars(part)
        kept = {key: value for key, value in table.items() if key not in _LEFT_ALONE}
        tables.append((table, kept))
        for value in (*kept.values(), *part._buffers.values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = (value, value.detach().clone())
            elif isinstance(value, _COLLECTIONS):
                contents.append((value, _plain(value)))
            elif isinstance(value, torch.Generator):
                dice.append(Dice(value.get_state, value.set_state, value.manual_seed))
            elif isinstance(value, random.Random):
                dice.append(Dice(value.getstate, value.setstate, value.seed))
            elif _has_table(value) and not callable(value):
                contents.append((vars(value), dict(vars(value))))
    outside = [(slot, slot.read()) for slot in slots]
    for _, value in outside:
        contents += _changeable(value)
    iterators = [(slot, copy.copy(value)) for slot, value in outside if _is_copyable(value)]
    if any(parameter.is_cuda for parameter in module.parameters()):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        dice.append(Dice(generator.get_state, generator.set_state, generator.manual_seed))
    states = [die.read() for die in dice]

    def undo(seed: int | None = None) -> bool:
        for table, kept in tables:
            for key in [k for k in table if k not in kept and k not in _LEFT_ALONE]:
                del table[key]
            table.update(kept)
        for slot, value in outside:
            if slot.read() is not value:
                slot.write(value)
        for slot, iterator in iterators:
            slot.write(copy.copy(iterator))
        for value, before in contents:
            if not _same(value, before):
                kind: Any = type(before)  # a class of the user's may store in another way
                kind.clear(value)
                (kind.update if hasattr(kind, "update") else kind.extend)(value, before)
        with torch.no_grad():
            for tensor, values in tensors.values():
                # Writing counts as a change to what backward saved, so only where there is one.
                if not torch.equal(tensor, values):
                    tensor.copy_(values)
        moved = False
        for die, state in zip(dice, states, strict=True):
            if not _equal(die.read(), state):
                moved = True
                die.write(state)
            if seed is not None:
                die.seed(seed)
        return moved

    return undo


def _changeable(value: Any, depth: int = 3) -> list[tuple[Any, Any]]:
    """Return (collection or table of attributes, copy) for what a value holds that can change."""
    skip = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType)
    if isinstance(value, _COLLECTIONS):
        parts = [*value.values()] if isinstance(value, dict) else [*value]
    elif _has_table(value) and not isinstance(value, skip):
        value = vars(value)
        parts = [*value.values()]
    else:
        return []
    inner = [found for part in parts if depth for found in _changeable(part, depth - 1)]
    return [(value, _plain(value)), *inner]


def _plain(value: Any) -> Any:
    """Return a collection of the same contents, of no class of the user's."""
    return next(kind for kind in _COLLECTIONS if isinstance(value, kind))(value)


def _has_table(value: Any) -> bool:
    """Return whether a value has attributes of its own: ``list[int]`` shows those of list."""
    return isinstance(getattr(value, "__dict__", None), dict)


def _is_copyable(value: Any) -> bool:
    """Return whether a value is an iterator that can be set back by taking a copy of it."""
    return (
        isinstance(value, Iterator)
        and type(value).__module__ in ("builtins", "itertools")
        and (not isinstance(value, types.GeneratorType))
    )


def _same(one: Any, other: Any) -> bool:
    """Return whether two collections hold the same objects in the same order."""
    left, right = ([*v, *v.values()] if isinstance(v, dict) else [*v] for v in (one, other))
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _equal(one: Any, other: Any) -> bool:
    """Return whether two states of a generator are equal: tensors, or tuples with arrays."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    parts = zip(one, other, strict=True)
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in parts)
