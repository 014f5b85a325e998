"""What the command line draws from a folder that `normswap.save` wrote."""

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from normswap.methods.base import get_method, methods
from normswap.saving.folder import DESCRIPTION, read_folder


class Saved(NamedTuple):
    """A saved conversion.

    Attributes:
        tensors: by name.
        layers: names of the method's layers, in the order of the model.
        names: of the contexts; None for a method without labels.
        title: says what it is of.
    """

    tensors: dict[str, Tensor]
    layers: list[str]
    names: list[str] | None
    title: str


def read_saved(folder: str | os.PathLike[str]) -> Saved | None:
    """Return what a folder holds that `normswap.save` wrote, None if it is no such folder.

    Raises:
        CheckpointError: a file that is missing, cut short, changed, or of a newer version.
        NormswapError: safetensors is missing.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        return None
    content, tensors = read_folder(path)
    method = content["method"]
    labelled = method not in methods() or get_method(method).needs_context
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in content["layers"]))
    title = f"{content['base']['class']}, {method}: divergence by layer"
    return Saved(tensors, layers, list(content["contexts"]) if labelled else None, title)
