"""Files of an assigner: JSON, and safetensors for arrays; whole or not there, never pickle.

The JSON file names the file of arrays, whose own name holds its hash.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.errors import ContextError
from normswap.util.extras import need
from normswap.util.whole_file import as_path, digest, read_description, read_file, write_pair

NAME = "contexts.json"
FORMAT = "normswap-contexts"
# Files of version 1 have no digest of the JSON.
VERSION = 2
_ARRAYS = r"contexts-[0-9a-f]{16}\.safetensors"
_MOST = 1 << 28
_MOST_ARRAYS = 1 << 31  # where the JSON, of version 1, does not say


def write(
    folder: str | os.PathLike[str], record: dict[str, Any], arrays: dict[str, Tensor]
) -> None:
    """Write an assigner's record and arrays into a folder, which is made if need be.

    Raises:
        ContextError: the folder cannot be written.
    """
    root = as_path(folder, ContextError)
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **record, "arrays": None}
    data = b""
    if arrays:
        save = need("safetensors.torch", "contexts", "saving an assigner with arrays").save
        data = save({name: array.contiguous() for name, array in arrays.items()})
        content["arrays"] = f"contexts-{digest(data)[:16]}.safetensors"
        content["sha256"], content["bytes"] = digest(data), len(data)
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ContextError(f"expected an assigner that JSON can hold: {error}") from error
    try:
        write_pair(root / NAME, content, content["arrays"], data, _named, _ARRAYS)
    except OSError as error:
        raise ContextError(f"cannot write an assigner to {root}: {error}") from error


def _named(root: Path) -> str | None:
    return _read_record(root).get("arrays")


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote.

    Raises:
        ContextError: nothing there, another format or version, or a damaged file.
    """
    root = as_path(folder, ContextError)
    content = _read_record(root)
    name = content.get("arrays")
    if name is None:
        return content, {}
    if not isinstance(name, str) or Path(name).name != name:
        raise ContextError(f"expected {NAME} in {root} to name a file beside it, got {name!r}")
    try:
        size = content.get("bytes")
        data = read_file(root / name, size if type(size) is int else _MOST_ARRAYS)
    except OSError as error:
        raise ContextError(f"the arrays of the assigner in {root} are missing: {error}") from error
    if digest(data) != content.get("sha256"):
        raise ContextError(f"{root / name} is damaged: it is not what {NAME} was saved with")
    load = need("safetensors.torch", "contexts", "loading an assigner with arrays").load
    try:
        return content, load(data)
    except Exception as error:  # of the library's own type
        raise ContextError(f"{root / name} does not read as safetensors: {error}") from error


def _read_record(root: Path) -> dict[str, Any]:
    try:
        content, found = read_description(root / NAME, _MOST)
    except OSError as error:
        raise ContextError(f"expected a saved assigner in {root}: {error}") from error
    except ValueError as error:
        raise ContextError(f"{root / NAME} is damaged: {error}") from error
    if content.get("format") != FORMAT:
        raise ContextError(f"{root / NAME} is no assigner that normswap.contexts saved")
    version = content.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise ContextError(
            f"expected version {VERSION} of an assigner in {root}, got {version!r}; another "
            "version of normswap wrote it"
        )
    if content.get("digest", found if version == 1 else None) != found:
        raise ContextError(f"{root / NAME} was changed after it was written; save again")
    return content
