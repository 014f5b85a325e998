"""Image files of a folder or a zip, decoded by several processes, which load no torch for it."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from joblib import Parallel, delayed
from PIL import Image, ImageOps
from tqdm import tqdm

from .errors import RecipeError

LEAST = 1000  # a process takes as long to start as some hundreds of small images to decode
Size = int | tuple[int, int]  # of a square, or width and height


@contextmanager
def opened(root: Path) -> Iterator[Path]:
    """Give a folder, or one of its name that a zip is unpacked into."""
    if not zipfile.is_zipfile(root):
        yield root
        return
    with TemporaryDirectory() as folder:
        inside = Path(folder, root.name)  # what is said of it, and of one domain's, names it
        try:
            with zipfile.ZipFile(root) as archive:
                archive.extractall(inside)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError) as error:
            raise RecipeError(f"cannot unpack {root}: {error}") from error
        yield inside


def decode(paths: Sequence[Path], size: Size, workers: int) -> np.ndarray:
    """Decode images into uint8 (N, H, W, 3), in the order of `paths`."""
    pool = Parallel(max(1, min(workers, len(paths) // LEAST)), return_as="generator")
    images = pool(delayed(read)(path, size) for path in paths)
    return np.stack(list(tqdm(images, "decoding", len(paths), disable=None)))


def read(path: Path, size: Size) -> np.ndarray:
    size = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))
    except Exception as error:  # the decoders of formats raise errors of many classes
        raise RecipeError(f"cannot read the image {path}: {error}") from error
