"""The names of everything below a module."""

from torch import Tensor, nn


class Names:
    """Names of everything below a module.

    Attributes:
        paths: id of a module -> its name.
        tensors: id of a parameter, a buffer or another tensor attribute -> its name.
    """

    def __init__(self, root: nn.Module) -> None:
        self.paths: dict[int, str] = {}
        self.tensors: dict[int, str] = {}
        for name, module in root.named_modules():
            self.paths[id(module)] = name
            prefix = f"{name}." if name else ""
            table = vars(module)
            for key, value in (*table["_parameters"].items(), *table["_buffers"].items()):
                if value is not None:
                    self.tensors.setdefault(id(value), prefix + key)
            for key, value in table.items():
                if isinstance(value, Tensor):
                    self.tensors.setdefault(id(value), prefix + key)
