"""A saved conversion by a name: a folder here, or a repository of the Hugging Face hub."""

import re
from os import PathLike
from pathlib import Path
from typing import Any

from normswap.errors import CheckpointError
from normswap.saving.folder import DESCRIPTION, as_folder
from normswap.util.extras import need

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = [DESCRIPTION, "tensors-*.safetensors"]


def find_folder(folder: str | PathLike[str]) -> Path:
    """Return the folder of a saved conversion, from the hub where none is here.

    What is at the path wins. A string "user/name" that leads to nothing here is looked up as a
    repository, of which the files of a conversion alone are fetched, into the hub's cache.

    Raises:
        CheckpointError: no path, or a repository that the hub does not give.
        NormswapError: a repository without huggingface_hub.
    """
    path = as_folder(folder)
    if path.exists() or not isinstance(folder, str) or not _REPOSITORY.fullmatch(folder):
        return path
    purpose = f"loading {folder!r} from the hub, since no folder here has the name,"
    hub: Any = need("huggingface_hub", "hub", purpose)
    try:
        return Path(hub.snapshot_download(folder, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # the hub's own errors are such
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"found no folder {folder}, and the hub gives no repository of that name: {said}"
        ) from error
