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
from normswap.extras import need

NAME = "contexts.json"
FORMAT = "normswap-contexts"
VERSION = 1


def write(
    folder: str | os.PathLike[str], record: dict[str, Any], arrays: dict[str, Tensor]
) -> None:
    """Write an assigner's record and arrays into a folder, which is made if need be.

    Raises:
        ContextError: the folder cannot be written.
    """
    root = Path(folder)
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **record, "arrays": None}
    data = b""
    if arrays:
        save = need("safetensors.torch", "contexts", "saving an assigner with arrays").save
        data = save({name: array.contiguous() for name, array in arrays.items()})
        content["arrays"] = f"contexts-{_digest(data)[:16]}.safetensors"
        content["sha256"] = _digest(data)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
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
    root = Path(folder)
    try:
        content = json.loads((root / NAME).read_bytes())
    except OSError as error:
        raise ContextError(f"expected a saved assigner in {root}: {error}") from error
    except ValueError as error:
        raise ContextError(f"{root / NAME} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ContextError(f"{root / NAME} is no assigner that normswap.contexts saved")
    if content.get("version") != VERSION:
        raise ContextError(
            f"expected version {VERSION} of an assigner in {root}, got {content.get('version')!r}; "
            "another version of normswap wrote it"
        )
    return content, _read_arrays(root, content)


def _read_arrays(root: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    name = content.get("arrays")
    if name is None:
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise ContextError(f"expected {NAME} in {root} to name a file beside it, got {name!r}")
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        raise ContextError(f"the arrays of the assigner in {root} are missing: {error}") from error
    if _digest(data) != content.get("sha256"):
        raise ContextError(f"{root / name} is damaged: it is not what {NAME} was saved with")
    load = need("safetensors.torch", "contexts", "loading an assigner with arrays").load
    loaded: dict[str, Tensor] = load(data)
    return loaded


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
