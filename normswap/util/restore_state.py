"""Put a model's state back after runs that must leave no trace."""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Of a module's own table: what holds modules and parameters, and what this package keeps there.
_LEFT_ALONE = ("_modules", "_parameters", "_normswap", "_normswap_record", "scope", "training")


def remember(module: nn.Module) -> Callable[[], bool]:
    """Return what puts buffers, plain attributes and the random states back as they are now.

    Attributes are put back by reference, collections and plain objects with what they hold,
    tensors with their values, generators with their states; so are the generators of Python,
    NumPy and torch that the whole program shares. What is returned says, each time it is called,
    whether any of them had moved.
    """
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    # What reads the state of a generator, and what sets it.
    dice: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    # NumPy is no dependency: only where the program has imported it.
    if numpy := sys.modules.get("numpy.random"):
        dice.append((numpy.get_state, numpy.set_state))
    for part in module.modules():
        table = vars(part)
        kept = {key: value for key, value in table.items() if key not in _LEFT_ALONE}
        tables.append((table, kept))
        for value in (*kept.values(), *part._buffers.values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = (value, value.detach().clone())
            elif isinstance(value, list | dict | set | deque):
                contents.append((value, copy.copy(value)))
            elif isinstance(value, torch.Generator):
                dice.append((value.get_state, value.set_state))
            elif isinstance(value, random.Random):
                dice.append((value.getstate, value.setstate))
            elif hasattr(value, "__dict__") and not callable(value):
                contents.append((vars(value), dict(vars(value))))
    if any(parameter.is_cuda for parameter in module.parameters()):
        device = torch.cuda.current_device()
        dice.append(
            (
                lambda: torch.cuda.get_rng_state(device),
                lambda state: torch.cuda.set_rng_state(state, device),
            )
        )
    states = [read() for read, _ in dice]

    def undo() -> bool:
        for table, kept in tables:
            for key in [k for k in table if k not in kept and k not in _LEFT_ALONE]:
                del table[key]
            table.update(kept)
        for value, before in contents:
            if not _same(value, before):
                value.clear()
                value.update(before) if hasattr(value, "update") else value.extend(before)
        with torch.no_grad():
            for tensor, values in tensors.values():
                # Writing counts as a change to what backward saved, so only where there is one.
                if not torch.equal(tensor, values):
                    tensor.copy_(values)
        moved = False
        for (read, put_back), state in zip(dice, states, strict=True):
            if not _equal(read(), state):
                moved = True
                put_back(state)
        return moved

    return undo


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


def reseed(seed: int) -> None:
    """Start Python's, NumPy's and torch's generators from a seed."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.default_generators:
        torch.cuda.manual_seed(seed)
