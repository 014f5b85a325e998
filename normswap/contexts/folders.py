"""Contexts from the folders that images lie in, one a domain."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.contexts.assigner import UNKNOWN, Assigner
from normswap.errors import ContextError
from normswap.util.arguments import describe

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"]
)
PathLike = str | os.PathLike[str]


class FolderAssigner(Assigner):
    """Labels paths by the domain folder they lie in.

    A path below the root belongs to the first folder under it. Any other path, of a test set
    elsewhere, say, belongs to the domain whose name is among its folders; to none (-1) if no name
    is, or several are.

    Attributes:
        root: the folder it was built from.
        paths: the images found there, in the order of `labels`; () after loading.
    """

    kind = "folders"

    def __init__(self, names: Sequence[str], root: str) -> None:
        super().__init__(names)
        self.root = root
        self.paths: tuple[Path, ...] = ()
        self._index = {_normalize(name): k for k, name in enumerate(self.names)}

    def __call__(self, batch: PathLike | Iterable[PathLike]) -> Tensor:
        """Return the domain of each path; see the class and `Assigner`."""
        given: Any = batch
        several = isinstance(given, Iterable) and not isinstance(given, str | os.PathLike | Tensor)
        paths = list(given) if several else [given]
        for path in paths:
            if not isinstance(path, str | os.PathLike):
                kind = describe(path)
                raise ContextError(f"expected paths, got {kind}; folders tell the context of files")
        return torch.tensor(
            [self._label(os.fspath(path)) for path in paths], dtype=torch.int64, device="cpu"
        )

    def _label(self, path: str) -> int:
        inside = os.path.relpath(os.path.abspath(path), self.root)
        folders = Path(inside).parts[:-1]
        if folders and folders[0] != os.pardir:
            return self._index.get(_normalize(folders[0]), UNKNOWN)
        found = {self._index.get(_normalize(part), UNKNOWN) for part in Path(path).parts[:-1]}
        found.discard(UNKNOWN)
        return found.pop() if len(found) == 1 else UNKNOWN

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the root."""
        return {"root": self.root}, {}

    @classmethod
    def restore(
        cls, names: list[str], record: dict[str, Any], arrays: dict[str, Tensor], features: Any
    ) -> "FolderAssigner":
        """Rebuild; see `Assigner`."""
        return cls(names, os.fspath(record["root"]))


def from_folders(root: PathLike) -> FolderAssigner:
    """Make a context of each folder under a root: ROOT/DOMAIN/.../image.

    Images may lie at any depth below a domain; where they lie in ROOT/DOMAIN/CLASS/, the report
    says how much the domain tells of the class. Names that start with a dot are left out.

    Args:
        root: the folder of folders.

    Returns:
        An assigner of paths; its `paths` and `labels` are the images found.

    Raises:
        ContextError: no such folder, no images in it, images directly under it, or two folders
            whose names differ by nothing one can see (composed and decomposed accents).

    Warns:
        ContextWarning: of tiny contexts, and of domains that give the class away.
    """
    found = list_images(root)
    base = os.path.abspath(root)
    assigner = FolderAssigner(list(found), base)
    if len(assigner._index) < len(found):
        raise ContextError(
            f"expected folders of different names in {root}, got {', '.join(map(repr, found))}"
        )
    paths = [path for images in found.values() for path in images]
    counts = [len(images) for images in found.values()]
    labels = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)], device="cpu")
    inside = [path.relative_to(root).parts for path in paths]
    assigner.paths = tuple(paths)
    assigner.count(labels, [parts[1] if len(parts) > 2 else None for parts in inside])
    assigner.warn()
    return assigner


def list_images(root: PathLike) -> dict[str, list[Path]]:
    """Return the images below each folder of a root, at any depth; both are sorted by name.

    Folders without images are left out, as are names that start with a dot.

    Raises:
        ContextError: no such folder, or no images in folders of it, or images beside them.
    """
    top = Path(root)
    if not top.is_dir():
        raise ContextError(f"expected a folder of domain folders, found none at {top}")
    endings = f"known endings are {' '.join(sorted(IMAGE_SUFFIXES))}"
    entries = sorted(entry for entry in top.iterdir() if not entry.name.startswith("."))
    if loose := [entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir()]:
        raise ContextError(
            f"expected images in one folder a domain under {top}, got {len(loose)} directly there "
            f"({loose[0]}, ...); move them into one"
        )
    found = {entry.name: _below(entry) for entry in entries if entry.is_dir()}
    found = {name: images for name, images in found.items() if images}
    if not found:
        raise ContextError(
            f"expected images as DOMAIN/.../image under {top}, found none; {endings}"
        )
    return found


def _below(folder: Path) -> list[Path]:
    images: list[Path] = []
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would be walked for ever.
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        if real not in seen:
            images += [Path(where, name) for name in files if _is_image(name)]
        seen.add(real)
    return sorted(images)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _normalize(name: str) -> str:
    # File systems differ in how they store accents.
    return unicodedata.normalize("NFC", name)
