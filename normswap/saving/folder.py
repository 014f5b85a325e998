"""A folder with a description and tensors that a kill at any byte leaves whole, here or on the hub.

normswap.json                 the description; names the file below and its digest
tensors-RANDOM.safetensors    written first, under a name of its own
"""

import os
import re
import secrets
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from normswap.errors import CheckpointError, NormswapError
from normswap.saving.schema import find_wrong
from normswap.util import whole_file
from normswap.util.arguments import describe
from normswap.util.extras import need
from normswap.util.whole_file import as_path, digest, read_file, write_pair

DESCRIPTION = "normswap.json"
FORMAT = 3  # 1 has no samples, 2 no number of answering contexts
_TENSORS = r"tensors-[0-9a-f]{16}\.safetensors"
_MOST_DESCRIPTION = 1 << 28
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = [DESCRIPTION, "tensors-*.safetensors"]


def write_folder(folder: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a description and tensors; what was there stays readable until both are on disk.

    Raises:
        NormswapError: safetensors or NumPy is missing.
        CheckpointError: `folder` is a file or cannot be written to, or the description holds what
            JSON cannot.
    """
    need("numpy", "save", "saving a conversion")  # safetensors takes the bytes through it
    library: Any = need("safetensors.torch", "save", "saving and loading a conversion")
    data: bytes = library.save(
        {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    )
    name = f"tensors-{secrets.token_hex(8)}.safetensors"
    file = {"name": name, "bytes": len(data), "sha256": digest(data)}
    content = {"format": FORMAT, **content, "file": file}
    try:
        write_pair(folder / DESCRIPTION, content, name, data, _named, _TENSORS)
    except TypeError as error:
        raise CheckpointError(f"expected options that JSON can hold: {error}") from error
    except FileExistsError as error:
        raise CheckpointError(f"expected a folder to save to, got the file {folder}") from error
    except (OSError, ValueError) as error:  # no right to write, no space, no such path
        raise CheckpointError(f"cannot save to {folder}: {error}") from error


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a description and its tensors, without running code from them.

    Raises:
        CheckpointError: a file that is missing, cut short, changed, or of a newer format.
    """
    library: Any = need("safetensors.torch", "save", "saving and loading a conversion")
    content = read_description(folder)
    while True:
        named = content["file"]
        try:
            data = read_file(folder / named["name"], named["bytes"])
            break
        except FileNotFoundError:
            # A save may have finished meanwhile and removed it.
            again = read_description(folder)
            if again["file"]["name"] == named["name"]:
                raise CheckpointError(
                    f"expected {named['name']} beside {folder / DESCRIPTION}, which names it; "
                    "copy both"
                ) from None
            content = again
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / named['name']}: {error}") from error
    if len(data) != named["bytes"] or digest(data) != named["sha256"]:
        raise CheckpointError(
            f"expected {named['bytes']} bytes with the digest in {DESCRIPTION}, got {len(data)} "
            f"others: {folder / named['name']} is cut short or was changed"
        )
    try:
        return content, library.load(data)
    except Exception as error:  # of a library's own type, or none in particular
        raise CheckpointError(
            f"{folder / named['name']} does not read as safetensors: {error}"
        ) from error


def read_description(folder: Path) -> dict[str, Any]:
    """Read and check the description alone, as `read_folder` does."""
    path = folder / DESCRIPTION
    try:
        content, found = whole_file.read_description(path, _MOST_DESCRIPTION)
    except (FileNotFoundError, NotADirectoryError):
        missing = path if folder.is_dir() else f"folder {folder}"
        raise CheckpointError(
            f"expected a folder that normswap.save wrote, found no {missing}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    version = content.get("format")
    if type(version) is not int or version < 1 or "digest" not in content:
        raise CheckpointError(f"{path} is not a description that normswap.save wrote")
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, of normswap {content.get('normswap')}; this version "
            f"knows formats up to {FORMAT}: upgrade normswap"
        )
    if content["digest"] != found:
        raise CheckpointError(f"{path} was changed after it was written; save again")
    if version == 1:
        content["samples"] = {}
    if version < 3:
        content["answering"] = None
    wrong = find_wrong(content)
    if wrong is not None:
        raise CheckpointError(f"{path} is not a description that normswap.save wrote: {wrong}")
    if not re.fullmatch(_TENSORS, content["file"]["name"]):
        raise CheckpointError(f"{path} names a file of another kind: {content['file']['name']!r}")
    return content


def _named(folder: Path) -> str:
    return str(read_description(folder)["file"]["name"])


def find_folder(
    folder: str | os.PathLike[str], revision: str | None = None, subfolder: str | None = None
) -> Path:
    """Return the folder of a saved conversion, from the hub where none is here.

    What is at the path wins, unless a revision asks for a repository. A string "user/name" that
    leads to nothing here, nor to a place in a folder that is here, is looked up as a repository, of
    which the files of a conversion alone are fetched, into the hub's cache.

    Args:
        folder: a path, or "user/name".
        revision: branch, tag or commit of the repository; "main" by default.
        subfolder: where the conversion lies below the folder or the top of the repository.

    Raises:
        CheckpointError: no path, a revision of no repository, a repository that the hub does not
            give, no place below it, or no huggingface_hub.
    """
    path = as_path(folder, CheckpointError)
    below = _below(subfolder)
    is_repository = isinstance(folder, str) and bool(_REPOSITORY.fullmatch(folder))
    if revision is not None and not (is_repository and isinstance(revision, str) and revision):
        raise CheckpointError(
            'expected revision= as the name of a branch, tag or commit of a repository "user/name" '
            f"on the hub, got {describe(revision)} of {folder}"
        )
    if revision is None and (not is_repository or os.path.exists(path)):
        return path / below
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
        files = [(below / name).as_posix() for name in _FILES]
        top = hub.snapshot_download(folder, revision=revision, allow_patterns=files)
        return Path(top) / below
    except Exception as error:  # of the hub, of what it speaks HTTP with, of the disk
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{here}, and the hub gives no repository {folder} so: {said}"
        ) from error


def _below(subfolder: str | None) -> PurePosixPath:
    """Return a subfolder as a path that stays below the place it is asked of."""
    if subfolder is None:
        return PurePosixPath()
    below = PurePosixPath(subfolder) if isinstance(subfolder, str) and subfolder else None
    if below is None or below.is_absolute() or ".." in below.parts or "\\" in subfolder:
        raise CheckpointError(
            'expected subfolder= as a path below the folder, such as "run/norms", got '
            f"{describe(subfolder)}"
        )
    return below
