"""Graphs traced before that stand for another container too: the blocks of a stage are alike."""

from typing import Any

from torch import nn

from normswap.graph.tracing.names import Names, returns_tensor
from normswap.graph.tracing.traced import Traced


class GraphCache:
    """What was traced so far, by the class of the container and the kinds of its arguments."""

    def __init__(self) -> None:
        self._traced: dict[Any, list[Traced]] = {}
        self._names: dict[nn.Module, Names] = {}

    def names_of(self, root: nn.Module) -> Names:
        """Return the names of everything below a container."""
        if root not in self._names:
            self._names[root] = Names(root)
        return self._names[root]

    def keep(self, key: Any, traced: Traced) -> Traced:
        """Remember a graph, unless it depends on more than the structure of the container."""
        if traced.alike:
            self._traced.setdefault(key, []).append(traced)
        return traced

    def find(self, key: Any, root: nn.Module) -> Traced | None:
        """Return a graph that stands for a container.

        It has the same modules and tensors under the same names, of the same classes, every
        attribute that was read has the same value, and what its children return is as certain.
        """
        names = self.names_of(root)
        for traced in self._traced.get(key, ()):
            known = traced.names
            if known.types != names.types or known.listed != names.listed:
                continue
            children = traced.children.items()
            certain = all(returns_tensor(root.get_submodule(n)) == some for n, some in children)
            if certain and traced.guards.hold(root):
                return traced
        return None
