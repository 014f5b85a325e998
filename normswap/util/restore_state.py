"""Put a model's state back after runs that must leave no trace."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Of a module's own table: what holds modules and parameters, and what this package keeps there.
_LEFT_ALONE = ("_modules", "_parameters", "_normswap", "_normswap_record", "scope", "training")


def remember(module: nn.Module) -> Callable[[], None]:
    """Return what puts buffers, plain attributes and the random state back as they are now.

    Attributes are put back by reference, lists, dicts and sets with their contents, tensors with
    their values.
    """
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    for part in module.modules():
        table = vars(part)
        kept = {key: value for key, value in table.items() if key not in _LEFT_ALONE}
        tables.append((table, kept))
        for value in (*kept.values(), *part._buffers.values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = (value, value.detach().clone())
            elif type(value) in (list, dict, set):
                contents.append((value, value.copy()))
    on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    device = torch.cuda.current_device() if on_cuda else None
    state = torch.get_rng_state()
    cuda = None if device is None else torch.cuda.get_rng_state(device)

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
        torch.set_rng_state(state)
        if device is not None and cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return undo
