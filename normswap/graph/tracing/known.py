"""Graphs traced before that stand for another container too: the blocks of a stage are alike."""

from typing import Any, NamedTuple

from torch import nn

from normswap.graph.state import Variant
from normswap.graph.tracing.names import Names, returns_tensor
from normswap.graph.tracing.tracer import Traced


class _Example(NamedTuple):
    variant: Variant
    types: list[tuple[str, type]]
    tensors: list[str]
    children: dict[str, bool]


class Known:
    """What was traced so far, by the class of the container and the kinds of its arguments."""

    def __init__(self) -> None:
        self._examples: dict[Any, list[_Example]] = {}
        self._names: dict[nn.Module, Names] = {}

    def names_of(self, root: nn.Module) -> Names:
        """Return the names of everything below a container."""
        if root not in self._names:
            self._names[root] = Names(root)
        return self._names[root]

    def keep(self, key: Any, names: Names, variant: Variant, paths: list[Traced]) -> None:
        """Remember a graph, unless the forward read what cannot be compared."""
        if all(path.plain for path in paths):
            children = {name: some for path in paths for name, some in path.children.items()}
            example = _Example(variant, names.types, list(names.tensors.values()), children)
            self._examples.setdefault(key, []).append(example)

    def find(self, key: Any, names: Names, module: nn.Module) -> Variant | None:
        """Return a graph that stands for a container.

        It has the same modules and tensors under the same names, of the same classes, every
        attribute that was read has the same value, and what its children return is as certain.
        """
        for variant, types, tensors, children in self._examples.get(key, ()):
            if types != names.types or tensors != list(names.tensors.values()):
                continue
            alike = all(
                returns_tensor(module.get_submodule(name)) == some
                for name, some in children.items()
            )
            if alike and variant.holds(module):
                return variant
        return None
