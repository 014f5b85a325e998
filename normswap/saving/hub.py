"""A saved conversion by a name: a folder here, or a repository of the Hugging Face hub."""

import os
import re
from os import PathLike
from pathlib import Path
from typing import Any

from normswap.errors import CheckpointError, NormswapError
from normswap.saving.folder import DESCRIPTION, as_folder
from normswap.util.extras import need

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = [DESCRIPTION, "tensors-*.safetensors"]


def find_folder(folder: str | PathLike[str]) -> Path:
    """Return the folder of a saved conversion, from the hub where none is here.

    What is at the path wins. A string "user/name" that leads to nothing here is looked up as a
    repository, of which the files of a conversion alone are fetched, into the hub's cache.

    Raises:
        CheckpointError: no path, a repository that the hub does not give, or no huggingface_hub.
    """
    path = as_folder(folder)
    if os.path.exists(path) or not isinstance(folder, str) or not _REPOSITORY.fullmatch(folder):
        return path
    purpose = f"loading {folder!r} from the hub, since no folder here has the name,"
    try:
        hub: Any = need("huggingface_hub", "hub", purpose)
    except NormswapError as error:
        raise CheckpointError(f"found no folder {folder}; {error}") from error
    try:
        return Path(hub.snapshot_download(folder, allow_patterns=_FILES))
    except Exception as error:  # of the hub, of what it speaks HTTP with, of the disk
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"found no folder {folder}, and the hub gives no repository of that name: {said}"
        ) from error
