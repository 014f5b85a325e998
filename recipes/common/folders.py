"""A folder of images in the layout DOMAIN/CLASS/image, such as PACS, decoded once into memory.

Of DOMAIN/{train,test}/CLASS/image, or {train,test}/CLASS/image for one domain, the split is kept.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from normswap import ContextError, contexts

from . import decoding
from .data import Augmentation, DomainData, stratified_mask
from .errors import RecipeError, check, check_names

TEST_FRACTION = 0.2
PARTS = {"train", "test"}
LAYOUT = "expected images as DOMAIN/CLASS/image"
Files = dict[str, dict[str, list[Path]]]  # by domain and class


def load_folder(
    root: Path, size: int, seed: int = 0, held_out: str | None = None, limit: int | None = None,
    workers: int = 2, domains: Sequence[str] | None = None, flat: bool = False,
) -> DomainData:  # fmt: skip
    """Load a folder of domains, or a zip of it; images become squares, by resizing and cropping.

    A fifth of each class of each domain is the test split, unless the folder has one; of the
    held-out domain, all of it. `limit` is of each class of each domain, and each part of a split.
    """
    with decoding.opened(root) as root:
        files, split = list_folder(root, flat)
        names = sorted(files) if domains is None else list(dict.fromkeys(domains))
        check_names(f"domains of {root}, which are", names, sorted(files))
        classes, found = sorted(files[names[0]]), []
        if held_out is not None:
            check_names("--held-out to be one of the domains", [held_out], names)
            second = f"expected a second domain in {root} to train on beside {held_out!r}"
            check(len(names) > 1, second)
        for tests in (False,) if split is None else (True, False):
            for domain, name in enumerate(names):
                for label, kind in enumerate(classes):
                    paths = [p for p in files[name][kind] if tests == is_test(p, root, split)]
                    found += [(path, label, domain, tests) for path in paths[:limit]]
        paths, *numbers = zip(*found, strict=True)
        images = decode(paths, size, workers)
    labels, homes, test = map(torch.tensor, numbers)
    note = f"the folders test of {root.name} test"
    if split is None:
        note = f"a random fifth of each class of each domain of {root.name} tests"
        generator = torch.Generator().manual_seed(seed)
        test = stratified_mask(homes * len(classes) + labels, TEST_FRACTION, generator)
    if held_out is not None:
        test |= homes == names.index(held_out)
    how = Augmentation(side=(0.7, 1.0), shift=0.0, flip=True)
    more = {"held_out": held_out, "note": note, "given_split": split is not None}
    return DomainData(images, labels, homes, ~test, test, classes, names, how, **more)


def is_test(path: Path, root: Path, split: int | None) -> bool:
    """Tell whether the folder of a path that names its part names the one that tests."""
    return split is not None and path.relative_to(root).parts[split] == "test"


def list_folder(root: Path, flat: bool = False) -> tuple[Files, int | None]:
    """List the images by domain and class, and check that every domain has every class.

    With `flat`, a folder CLASS/image is one domain of the folder's name. Beside the images comes
    how deep the folders of a split are, None where there is none.
    """
    expected = "expected --data to be a folder DOMAIN/CLASS/image or a zip of one"
    check(root.is_dir(), f"{expected}, none at {root}")
    try:
        found = contexts.list_images(root)
    except ContextError as error:
        raise RecipeError(f"{LAYOUT}: {error}") from error
    every = [path for images in found.values() for path in images]
    above, split = 1, None  # folders between the root and the class
    if set(found) == PARTS:
        split, found = 0, {root.resolve().name: every}
    elif {path.relative_to(root).parts[1] for path in every} == PARTS:
        above, split = 2, 1
    elif flat and all(path.parent.parent == root for path in every):
        above, found = 0, {root.resolve().name: every}
    files: Files = {domain: {} for domain in found}
    for domain, images in found.items():
        for path in images:
            inside = path.relative_to(root).parts[above:]
            check(len(inside) > 1, f"{LAYOUT} under {root}, found {path} in no class")
            files[domain].setdefault(inside[0], []).append(path)
    names = set().union(*files.values())
    for domain, classes in files.items():
        missing = ", ".join(sorted(names - set(classes)))
        check(
            not missing,
            f"expected every domain of {root} to have every class, but {domain!r} has no images "
            f"of {missing}; add them, or take the class or the domain away",
        )
        for name, images in classes.items():
            two = "expected two images or more a class, to train and to test"
            check(len(images) > 1, f"{two}, got one in {root / domain / name}")
            both = split is None or len({is_test(path, root, split) for path in images}) > 1
            where = f"{name!r} of {domain!r} in train and in test of {root}"
            check(both, f"expected images of {where}")
    return files, split


def decode(paths: Sequence[Path], size: decoding.Size, workers: int) -> Tensor:
    """Decode images into one uint8 tensor (N, 3, H, W), in the order of `paths`."""
    pixels = torch.from_numpy(decoding.decode(paths, size, workers))
    return pixels.permute(0, 3, 1, 2).contiguous()
