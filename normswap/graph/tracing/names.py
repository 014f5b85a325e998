"""What is known of the modules below a container before it is traced."""

from typing import Any

from torch import Tensor, nn

from normswap.graph.tracing.failure import is_torch
from normswap.util.original_class import STATE, container_class


class Names:
    """Names of everything below a module.

    Attributes:
        paths: id of a module -> its name.
        tensors: id of a parameter, a buffer or another tensor attribute -> its name.
        types: (name, class) of every module.
        listed: names of the tensors, each once.
    """

    def __init__(self, root: nn.Module) -> None:
        self.paths: dict[int, str] = {}
        self.tensors: dict[int, str] = {}
        self.types: list[tuple[str, type]] = []
        for name, module in root.named_modules():
            self.paths[id(module)] = name
            self.types.append((name, type(module)))
            prefix = f"{name}." if name else ""
            # Scripted modules keep theirs elsewhere.
            for table in (module._parameters, module._buffers, vars(module)):
                for key, value in table.items():
                    if isinstance(value, Tensor):
                        self.tensors.setdefault(id(value), prefix + key)
        self.listed = list(self.tensors.values())


def returns_tensor(module: nn.Module) -> bool:
    """Return whether a module is certain to: a layer of torch, a norm, a graph that ends so."""
    state: Any = vars(module).get(STATE)
    variants = [] if state is None else [v for found in state.variants.values() for v in found]
    if variants and all(variant.returns_tensor for variant in variants):
        return True
    cls = container_class(module)
    if cls is nn.Sequential:
        return bool(module._modules) and returns_tensor(module[-1])  # type: ignore[index]
    return is_torch(cls.__module__) and cls is not nn.MultiheadAttention
