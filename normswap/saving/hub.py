"""A saved conversion by a name: a folder here, or a repository of the Hugging Face hub."""

import os
import re
from os import PathLike
from pathlib import Path
from typing import Any

from normswap.errors import CheckpointError, NormswapError
from normswap.saving.folder import DESCRIPTION, as_folder
from normswap.util.arguments import describe
from normswap.util.extras import need

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = [DESCRIPTION, "tensors-*.safetensors"]


def find_folder(folder: str | PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of a saved conversion, from the hub where none is here.

    What is at the path wins, unless a revision asks for a repository. A string "user/name" that
    leads to nothing here, nor to a place in a folder that is here, is looked up as a repository, of
    which the files of a conversion alone are fetched, into the hub's cache.

    Args:
        folder: a path, or "user/name".
        revision: branch, tag or commit of the repository; "main" by default.

    Raises:
        CheckpointError: no path, a revision of no repository, a repository that the hub does not
            give, or no huggingface_hub.
    """
    path = as_folder(folder)
    is_repository = isinstance(folder, str) and bool(_REPOSITORY.fullmatch(folder))
    if revision is not None and not (is_repository and isinstance(revision, str) and revision):
        raise CheckpointError(
            'expected revision= as the name of a branch, tag or commit of a repository "user/name" '
            f"on the hub, got {describe(revision)} of {folder}"
        )
    if revision is None and (not is_repository or os.path.exists(path)):
        return path
    if revision is None and path.parent.is_dir():
        raise CheckpointError(
            f"found no folder {path.name} in {path.parent}, which is a folder here; for the "
            'repository of that name on the hub pass revision="main"'
        )
    here = f"found no folder {folder}" if revision is None else f"revision={revision!r} was given"
    purpose = f"loading {folder!r} from the hub ({here})"
    try:
        hub: Any = need("huggingface_hub", "hub", purpose)
    except NormswapError as error:
        raise CheckpointError(str(error)) from error
    try:
        return Path(hub.snapshot_download(folder, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # of the hub, of what it speaks HTTP with, of the disk
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{here}, and the hub gives no repository {folder} so: {said}"
        ) from error
