"""Keep inserted layers from a container that runs whatever children it finds.

`nn.Sequential` iterates over its children, as do forwards of classes made of lists and dicts of
modules: a layer inserted in such a container would run once more as one of them.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from normswap.graph.state import state_of


def hiding(base: Any) -> dict[str, Any]:
    """Return methods with which a subclass of a class of containers passes inserted layers over.

    None for classes whose children are attributes, found by name.
    """
    if not issubclass(base, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return {}

    def names(self: nn.Module) -> list[str]:
        state = state_of(self)
        return [] if state is None else state.children()

    def length(self: nn.Module) -> int:
        return int(base.__len__(self)) - len(names(self))

    def iterate(self: nn.Module) -> Iterator[Any]:
        if issubclass(base, nn.ModuleDict):
            return iter(keys(self))
        hidden = [self._modules[name] for name in names(self)]
        return iter([m for m in base.__iter__(self) if all(m is not h for h in hidden)])

    def keys(self: nn.Module) -> Any:
        hidden = names(self)
        return {key: None for key in base.keys(self) if key not in hidden}.keys()

    def values(self: nn.Module) -> Any:
        return dict(items(self)).values()

    def items(self: nn.Module) -> Any:
        hidden = names(self)
        return {key: module for key, module in base.items(self) if key not in hidden}.items()

    found: dict[str, Any] = {"__iter__": iterate, "__len__": length}
    if issubclass(base, nn.ModuleDict):
        found |= {"keys": keys, "values": values, "items": items}
    return found
