"""Put a model's state back after runs that must leave no trace."""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Of a module's own table: what holds modules and parameters, and what this package keeps there.
_LEFT_ALONE = ("_modules", "_parameters", "_normswap", "_normswap_record", "scope", "training")


def remember(module: nn.Module) -> Callable[[], None]:
    """Return what puts buffers, plain attributes and the random states back as they are now.

    Attributes are put back by reference, lists, dicts and sets with their contents, tensors with
    their values, generators with their states. Python's, NumPy's and torch's generators are those
    every program has.
    """
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    dice: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    # NumPy is no dependency: only where the program has imported it.
    if numpy := sys.modules.get("numpy.random"):
        dice.append((numpy.set_state, numpy.get_state()))
    for part in module.modules():
        table = vars(part)
        kept = {key: value for key, value in table.items() if key not in _LEFT_ALONE}
        tables.append((table, kept))
        for value in (*kept.values(), *part._buffers.values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = (value, value.detach().clone())
            elif type(value) in (list, dict, set):
                contents.append((value, value.copy()))
            elif isinstance(value, torch.Generator):
                dice.append((value.set_state, value.get_state()))
            elif isinstance(value, random.Random):
                dice.append((value.setstate, value.getstate()))
    on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    device = torch.cuda.current_device() if on_cuda else None
    dice.append((torch.set_rng_state, torch.get_rng_state()))
    if device is not None:
        cuda = torch.cuda.get_rng_state(device)
        dice.append((lambda state: torch.cuda.set_rng_state(state, device), cuda))

    def undo() -> None:
        for table, kept in tables:
            for key in [k for k in table if k not in kept and k not in _LEFT_ALONE]:
                del table[key]
            table.update(kept)
        for value, copy in contents:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
        with torch.no_grad():
            for tensor, copy in tensors.values():
                # Writing counts as a change to what backward saved, so only where there is one.
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)
        for put_back, state in dice:
            put_back(state)

    return undo


def reseed(seed: int) -> None:
    """Start Python's, NumPy's and torch's generators from a seed."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.default_generators:
        torch.cuda.manual_seed(seed)
