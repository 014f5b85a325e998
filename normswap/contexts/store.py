"""Files of an assigner: JSON, and safetensors for arrays; whole or not there, never pickle.

The JSON file names the file of arrays, whose own name holds its hash. Arrays are written first and
the JSON file is replaced last, so that a kill at any byte leaves the old pair or the new one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.errors import ContextError
from normswap.util.arguments import describe
from normswap.util.extras import need
from normswap.util.read_file import read_file

NAME = "contexts.json"
FORMAT = "normswap-contexts"
# Files of version 1 have no digest of the JSON.
VERSION = 2
_MOST = 1 << 28
_MOST_ARRAYS = 1 << 31  # where the JSON, of version 1, does not say


def write(
    folder: str | os.PathLike[str], record: dict[str, Any], arrays: dict[str, Tensor]
) -> None:
    """Write an assigner's record and arrays into a folder, which is made if need be.

    Raises:
        ContextError: the folder cannot be written.
    """
    root = _as_path(folder)
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **record, "arrays": None}
    data = b""
    if arrays:
        save = need("safetensors.torch", "contexts", "saving an assigner with arrays").save
        data = save({name: array.contiguous() for name, array in arrays.items()})
        content["arrays"] = f"contexts-{_digest(data)[:16]}.safetensors"
        content["sha256"], content["bytes"] = _digest(data), len(data)
    try:
        # As it will be read: JSON knows no tuples, and no keys but strings.
        content = json.loads(json.dumps(content, allow_nan=False))
        content["digest"] = _digest(_canonical(content))
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ContextError(f"expected an assigner that JSON can hold: {error}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        if arrays:
            _replace(root / content["arrays"], data)
        _replace(root / NAME, text.encode())
        # What was replaced, and what a killed process left.
        for old in (*root.glob("contexts-*.safetensors"), *root.glob("contexts*.tmp")):
            if old.name != content["arrays"]:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise ContextError(f"cannot write an assigner to {root}: {error}") from error


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote.

    Raises:
        ContextError: nothing there, another format or version, or a damaged file.
    """
    root = _as_path(folder)
    try:
        content = json.loads(read_file(root / NAME, _MOST))
        digest = _digest(_canonical(content)) if isinstance(content, dict) else None
    except OSError as error:
        raise ContextError(f"expected a saved assigner in {root}: {error}") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise ContextError(f"{root / NAME} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ContextError(f"{root / NAME} is no assigner that normswap.contexts saved")
    version = content.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise ContextError(
            f"expected version {VERSION} of an assigner in {root}, got {version!r}; another "
            "version of normswap wrote it"
        )
    if content.get("digest", digest if version == 1 else None) != digest:
        raise ContextError(f"{root / NAME} was changed after it was written; save again")
    return content, _read_arrays(root, content)


def _read_arrays(root: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    name = content.get("arrays")
    if name is None:
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise ContextError(f"expected {NAME} in {root} to name a file beside it, got {name!r}")
    try:
        size = content.get("bytes")
        data = read_file(root / name, size if type(size) is int else _MOST_ARRAYS)
    except OSError as error:
        raise ContextError(f"the arrays of the assigner in {root} are missing: {error}") from error
    if _digest(data) != content.get("sha256"):
        raise ContextError(f"{root / name} is damaged: it is not what {NAME} was saved with")
    load = need("safetensors.torch", "contexts", "loading an assigner with arrays").load
    try:
        loaded: dict[str, Tensor] = load(data)
    except Exception as error:  # of the library's own type
        raise ContextError(f"{root / name} does not read as safetensors: {error}") from error
    return loaded


def _canonical(content: dict[str, Any]) -> bytes:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()


def _as_path(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise ContextError(f"expected a folder as a path, got {describe(folder)}")
    return Path(folder)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
