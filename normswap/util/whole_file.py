"""A description in JSON and a file that it names: whole after a kill, and read with care.

The file is written first, under a name of its own. The description is replaced last and at once,
so that it always names a file that is complete. A stranger may have put there what is read.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normswap.errors import NormswapError
from normswap.util.arguments import describe

_AN_HOUR = 3600.0


def as_path(folder: Any, error: type[NormswapError]) -> Path:
    """Return a path; raise an error of this class where it is none."""
    if not isinstance(folder, str | os.PathLike):
        raise error(f"expected a folder as a path, got {describe(folder)}")
    return Path(folder)


def digest(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of(content: dict[str, Any]) -> str:
    """Return the digest of a description, its own entry ``digest`` left out."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file; nothing is read of one that is larger.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: a file that is not there, is no regular one (a named pipe would be waited for), is
            larger, or cannot be read.
    """
    # Opening a pipe without O_NONBLOCK waits for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is no regular file")
        if state.st_size > most:
            raise OSError(f"it has {state.st_size:,} bytes, more than the {most:,} expected")
        # One more, so that a file that grows meanwhile is seen to.
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"it grew beyond the {most:,} bytes expected")
    return data


def read_description(path: Path, most: int) -> tuple[dict[str, Any], str]:
    """Return the object in a JSON file, {} where it holds something else, and its digest.

    Raises:
        OSError: as `read_file`.
        ValueError: it is no JSON.
    """
    try:
        found = json.loads(read_file(path, most))
        content = found if isinstance(found, dict) else {}
        return content, digest_of(content)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


def write_pair(
    path: Path,
    content: dict[str, Any],
    name: str | None,
    data: bytes,
    named: Callable[[Path], str | None],
    names: str,
) -> None:
    """Write a description with its digest, and the file that it names; remove what they replace.

    Args:
        path: of the description, in a folder that is made if need be.
        content: of the description, without ``digest``.
        name: of the file beside it, None for no file.
        data: of that file.
        named: returns the name in the description that is there, of a folder, or fails.
        names: regular expression of all names that such files can have.

    Raises:
        OSError: nothing can be written there.
        TypeError: the description holds what JSON cannot.
    """
    # As it will be read: JSON knows no tuples, and no keys but strings.
    content = json.loads(json.dumps(content))
    text = json.dumps({**content, "digest": digest_of(content)}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)

    def in_use() -> str | None:
        try:
            return named(path.parent)
        except NormswapError:
            return None

    before = in_use()
    if name is not None:
        write_whole(path.with_name(name), data)
    try:
        write_whole(path, text.encode())
    except BaseException:
        if name is not None and in_use() != name:
            path.with_name(name).unlink(missing_ok=True)
        raise
    _sweep(path, names, before, name)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is either there whole or not at all, even if the machine stops."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(path: Path, names: str, before: str | None, name: str | None) -> None:
    """Remove the file just replaced, and what saves killed over an hour ago left.

    Younger files may belong to a save under way in another process.
    """
    left = re.compile(rf"\.?({names}|{re.escape(path.name)})(\.[0-9a-f]+\.tmp)?")
    for old in path.parent.iterdir():
        if left.fullmatch(old.name) and old.name not in (path.name, name):
            with contextlib.suppress(FileNotFoundError):
                if old.name == before or time.time() - old.stat().st_mtime > _AN_HOUR:
                    old.unlink()
