"""Image files unpacked and decoded by several processes, which load no torch for it."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from PIL import Image, ImageOps
from tqdm import tqdm

from .errors import RecipeError

# A process takes as long to start as some hundreds of small images to decode.
PART, LEAST = 200, 1000
Size = int | tuple[int, int]  # of a square, or width and height


@contextmanager
def opened(root: Path, workers: int) -> Iterator[Path]:
    """Give a folder, or one of its name that a zip is unpacked into."""
    if not zipfile.is_zipfile(root):
        yield root
        return
    with TemporaryDirectory() as folder:
        inside = Path(folder, root.name)  # what is said of it, and of one domain's, names it
        unpack(root, inside, workers)
        yield inside


def unpack(archive: Path, folder: Path, workers: int) -> None:
    """Unpack a zip into a folder; a broken or encrypted one is a RecipeError."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
            # One of each folder first: processes that make the same folder get in each other's way.
            firsts = {name.rpartition("/")[0]: name for name in names}
            opened.extractall(folder, firsts.values())
        files = [name for name in names if not name.endswith("/")]
        # Large parts, since each reads the list of files again.
        part = max(LEAST, -(-len(files) // workers))
        _shared("unpacking", part, _unpack, files, workers, archive, folder)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError) as error:
        raise RecipeError(f"cannot unpack {archive}: {error}") from error


def decode(paths: Sequence[Path], size: Size, workers: int) -> np.ndarray:
    """Decode images into uint8 (N, H, W, 3), in the order of `paths`."""
    return np.concatenate(_shared("decoding", PART, _decode, paths, workers, size))


def _shared(
    what: str, part: int, work: Callable[..., Any], items: Sequence[Any], workers: int, *args: Any
) -> list[Any]:
    """Give what `work` makes of so many items at a time, in order; show a bar on a terminal."""
    parts = [items[start : start + part] for start in range(0, len(items), part)]
    bar = partial(tqdm, desc=what, total=len(parts), disable=None)
    processes = max(1, min(workers, len(items) // LEAST))
    pool = Parallel(processes, return_as="generator", batch_size=1)
    return list(bar(pool(delayed(work)(part, *args) for part in parts)))


def _unpack(names: Sequence[str], archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder, names)


def _decode(paths: Sequence[Path], size: Size) -> np.ndarray:
    size = (size, size) if isinstance(size, int) else size
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
        except Exception as error:  # the decoders of formats raise errors of many classes
            raise RecipeError(f"cannot read the image {path}: {error}") from error
        images.append(np.array(fitted))
    return np.stack(images)
