"""A folder of images in the layout DOMAIN/CLASS/image, such as PACS, decoded once into memory.

Of DOMAIN/{train,test}/CLASS/image, or {train,test}/CLASS/image for one domain, the split is kept.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from normswap import ContextError, contexts

from . import decoding
from .data import Augmentation, DomainData, stratified_mask
from .errors import RecipeError, check_names

TEST_FRACTION = 0.2
PARTS = {"train", "test"}
Files = dict[str, dict[str, list[Path]]]  # by domain and class


def load_folder(
    root: Path,
    size: int,
    seed: int = 0,
    held_out: str | None = None,
    limit: int | None = None,
    workers: int = 2,
    domains: Sequence[str] | None = None,
    flat: bool = False,
) -> DomainData:
    """Load a folder of domains, or a zip of it; images become squares, by resizing and cropping.

    A fifth of each class of each domain is the test split, unless the folder has one; of the
    held-out domain, all of it. `limit` is of each class of each domain, and each part of a split.
    """
    if zipfile.is_zipfile(root):
        with TemporaryDirectory() as folder:
            inside = Path(folder, root.name)  # as what is said of it, and of one domain's, names it
            decoding.unpack(root, inside, workers)
            return load_folder(inside, size, seed, held_out, limit, workers, domains, flat)
    files, split = list_folder(root, flat)
    domain_names = sorted(files) if domains is None else list(dict.fromkeys(domains))
    check_names(f"domains of {root}, which are", domain_names, sorted(files))
    classes = sorted(files[domain_names[0]])
    if held_out is not None:
        check_names("--held-out to be one of the domains", [held_out], domain_names)
        if len(domain_names) == 1:
            raise RecipeError(f"expected a second domain in {root} to train on beside {held_out!r}")
    found = [
        (path, label, domain, tests)
        for tests in ((False,) if split is None else (True, False))
        for domain, domain_name in enumerate(domain_names)
        for label, class_name in enumerate(classes)
        for path in [p for p in files[domain_name][class_name] if tests == is_test(p, root, split)][
            :limit
        ]
    ]
    paths, *numbers = zip(*found, strict=True)
    labels, homes, test = map(torch.tensor, numbers)
    if split is None:
        generator = torch.Generator().manual_seed(seed)
        test = stratified_mask(homes * len(classes) + labels, TEST_FRACTION, generator)
    if held_out is not None:
        test |= homes == domain_names.index(held_out)
    return DomainData(
        images=decode(paths, size, workers),
        labels=labels,
        domains=homes,
        train=~test,
        test=test,
        classes=classes,
        domain_names=domain_names,
        augmentation=Augmentation(side=(0.7, 1.0), shift=0.0, flip=True),
        held_out=held_out,
        note=f"a random fifth of each class of each domain of {root.name} tests"
        if split is None
        else f"the folders test of {root.name} test",
        given_split=split is not None,
    )


def is_test(path: Path, root: Path, split: int | None) -> bool:
    """Tell whether the folder of a path that names its part names the one that tests."""
    return split is not None and path.relative_to(root).parts[split] == "test"


def list_folder(root: Path, flat: bool = False) -> tuple[Files, int | None]:
    """List the images by domain and class, and check that every domain has every class.

    With `flat`, a folder CLASS/image is one domain of the folder's name. Beside the images comes
    how deep the folders of a split are, None where there is none.
    """
    if not root.is_dir():
        raise RecipeError(
            f"expected --data to be a folder DOMAIN/CLASS/image or a zip of one, none at {root}"
        )
    try:
        found = contexts.list_images(root)
    except ContextError as error:
        raise RecipeError(f"expected images as DOMAIN/CLASS/image: {error}") from error
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
            if len(inside) == 1:
                raise RecipeError(
                    f"expected images as DOMAIN/CLASS/image under {root}, found {path} in no class"
                )
            files[domain].setdefault(inside[0], []).append(path)
    names = set().union(*files.values())
    for domain, classes in files.items():
        if missing := sorted(names - set(classes)):
            raise RecipeError(
                f"expected every domain of {root} to have every class, but {domain!r} has no "
                f"images of {', '.join(missing)}; add them, or take the class or the domain away"
            )
        for name, images in classes.items():
            if len(images) < 2:
                raise RecipeError(
                    f"expected two images or more a class, to train and to test, got one in "
                    f"{root / domain / name}"
                )
            if split is not None and len({is_test(path, root, split) for path in images}) < 2:
                raise RecipeError(
                    f"expected images of {name!r} of {domain!r} in train and in test of {root}"
                )
    return files, split


def decode(paths: Sequence[Path], size: int | tuple[int, int], workers: int) -> Tensor:
    """Decode images into one uint8 tensor (N, 3, H, W), in the order of `paths`."""
    pixels = torch.from_numpy(decoding.decode(paths, size, workers))
    return pixels.permute(0, 3, 1, 2).contiguous()
