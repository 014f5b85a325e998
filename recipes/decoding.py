"""Image files unpacked and decoded by several processes, which load no torch for it."""

import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from .errors import RecipeError

# A process takes as long to start as some hundreds of small images to decode.
PART, LEAST = 200, 1000


def unpack(archive: Path, folder: Path, workers: int) -> None:
    """Unpack a zip into a folder.

    Raises:
        RecipeError: a broken or encrypted zip.
    """
    try:
        _unpack_all(archive, folder, workers)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError) as error:
        raise RecipeError(f"cannot unpack {archive}: {error}") from error


def _unpack_all(archive: Path, folder: Path, workers: int) -> None:
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        # One of each folder first: processes that make the same folder get into each other's way.
        opened.extractall(folder, {name.rpartition("/")[0]: name for name in names}.values())
    files = [name for name in names if not name.endswith("/")]
    # Large parts, since each reads the list of files again.
    part = max(LEAST, -(-len(files) // workers))
    _shared("unpacking", part, _unpack, files, workers, archive, folder)


def decode(paths: Sequence[Path], size: int | tuple[int, int], workers: int) -> np.ndarray:
    """Decode images into uint8 (N, H, W, 3), in the order of `paths`.

    The size is that of a square, or width and height.
    """
    return np.concatenate(_shared("decoding", PART, _decode, paths, workers, size))


def _shared(
    what: str, part: int, work: Any, items: Sequence[Any], workers: int, *args: Any
) -> list[Any]:
    """Give what `work` makes of so many items at a time, in order; show a bar on a terminal."""
    parts = [items[start : start + part] for start in range(0, len(items), part)]
    bar = partial(tqdm, desc=what, total=len(parts), disable=None)
    number = min(workers, len(items) // LEAST)
    if number < 2:
        return [work(part, *args) for part in bar(parts)]
    with ProcessPoolExecutor(number, get_context("spawn")) as pool:
        waiting = [pool.submit(work, part, *args) for part in parts]
        try:
            return [future.result() for future in bar(waiting)]
        finally:
            pool.shutdown(cancel_futures=True)


def _unpack(names: Sequence[str], archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder, names)


def _decode(paths: Sequence[Path], size: int | tuple[int, int]) -> np.ndarray:
    width, height = (size, size) if isinstance(size, int) else size
    images = np.empty((len(paths), height, width, 3), dtype=np.uint8)
    for index, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(
                    image.convert("RGB"), (width, height), Image.Resampling.BICUBIC
                )
        except Exception as error:  # the decoders of formats raise errors of many classes
            raise RecipeError(f"cannot read the image {path}: {error}") from error
        images[index] = np.array(fitted)
    return images
