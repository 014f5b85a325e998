"""Graphs traced before that stand for another container too: the blocks of a stage are alike."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.graph.tracing.names import Names, returns_tensor
from normswap.graph.tracing.reads import NO_GUARDS, Guards, merge
from normswap.graph.tracing.traced import Traced


@dataclass
class Paths:
    """Every path through a forward, as traced for arguments of some kinds.

    Attributes:
        traced: the paths.
        names: of the container that was traced.
        guards: what must hold for any of them.
        variant: what was made of them for containers without inserted layers, if anything.
    """

    traced: list[Traced]
    names: Names | None = None
    guards: Guards = NO_GUARDS
    variant: Any = None


class GraphCache:
    """What was traced so far, by the class of the container and the kinds of its arguments."""

    def __init__(self) -> None:
        self._paths: dict[Any, list[Paths]] = {}
        self._names: dict[nn.Module, Names] = {}

    def names_of(self, root: nn.Module) -> Names:
        """Return the names of everything below a container."""
        if root not in self._names:
            self._names[root] = Names(root)
        return self._names[root]

    def keep(self, key: Any, root: nn.Module, traced: list[Traced]) -> Paths:
        """Remember paths, unless they depend on more than the structure of the container."""
        paths = Paths(traced, self.names_of(root), merge([path.reads for path in traced]))
        if all(path.alike for path in traced):
            self._paths.setdefault(key, []).append(paths)
        return paths

    def find(self, key: Any, root: nn.Module) -> Paths | None:
        """Return paths that stand for a container.

        It has the same modules and tensors under the same names, of the same classes, every
        attribute that was read has the same value, and what its children return is as certain.
        """
        names = self.names_of(root)
        for paths in self._paths.get(key, ()):
            known = paths.names
            if known is None or known.types != names.types or known.listed != names.listed:
                continue
            children = [child for path in paths.traced for child in path.children.items()]
            certain = all(returns_tensor(root.get_submodule(n)) == some for n, some in children)
            if certain and paths.guards.hold(root):
                return paths
        return None
