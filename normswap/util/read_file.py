"""Read a file that a stranger may have put there."""

import os
import stat
from pathlib import Path


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
