"""Images and masks by domain: DIR/DOMAIN/images/NAME.png (or .jpg), DIR/DOMAIN/masks/NAME.png.

A pixel of a mask is its class, 255 where there is none. Both are resized and centre-cropped to a
square, masks by nearest neighbour.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from . import decoding
from .augment import Augmentation
from .data import stratified_mask
from .errors import RecipeError, check, check_names
from .folders import decode
from .scenes import IGNORED, TEST, TRAIN, VALID, Scenes

KINDS = (".png", ".jpg", ".jpeg")
LEAST = 4  # scenes of a source, so that each part has one
Names = Sequence[str] | None


def read_scenes(
    root: Path, sources: Names, targets: Names, size: int, limit: int | None = None
) -> Scenes:
    """Read a folder; every scene of a source trains until `split`."""
    check(root.is_dir(), f"expected --data to be a folder DOMAIN/images/NAME.png, none at {root}")
    domains = sorted(path.name for path in root.iterdir() if (path / "images").is_dir())
    sources, targets = choose(root, domains, sources, targets)
    paths: list[tuple[Path, Path]] = []
    of: list[int] = []
    for number, name in enumerate((*sources, *targets)):
        found = pairs(root / name)[:limit]
        enough = number >= len(sources) or len(found) >= LEAST
        expected = f"expected {LEAST} images or more to train, validate and test on {name!r}"
        check(enough, f"{expected}, got {len(found)}")
        paths += found
        of += [number] * len(found)
    masks = torch.stack([read_mask(image, mask, (size, size)) for image, mask in paths])
    images = decode([image for image, _ in paths], size, workers=2)
    number = torch.tensor(of)
    classes = int(torch.where(masks == IGNORED, -1, masks.int()).max()) + 1
    check(classes > 1, f"expected masks of two classes or more under {root}, got {classes}")
    parts = torch.where(number < len(sources), TRAIN, TEST)
    how = Augmentation(side=(0.6, 1.0), shift=0.0, flip=True)
    return Scenes(images, masks, number, parts, list(sources), list(targets), classes, how)


def split(scenes: Scenes, seed: int) -> Scenes:
    """Give a quarter of each source to test and an eighth to validate, at random."""
    generator = torch.Generator().manual_seed(seed)
    mine = scenes.domains < len(scenes.sources)
    test = stratified_mask(scenes.domains, 0.25, generator) | ~mine
    # Those that test are groups of their own.
    groups = torch.where(test, scenes.domains + len(scenes.sources), scenes.domains)
    valid = stratified_mask(groups, 1 / 6, generator) & ~test
    return replace(scenes, parts=torch.where(test, TEST, torch.where(valid, VALID, TRAIN)))


def choose(
    root: Path, domains: Sequence[str], sources: Names, targets: Names
) -> tuple[Sequence[str], Sequence[str]]:
    """Fill in what was not named, and check what was."""
    listed = f"{root}: {', '.join(domains) or 'none'}"
    either = sources is not None or targets is not None
    check(either, f"expected --source or --target of the domains of {listed}")
    sources = [d for d in domains if d not in targets] if sources is None else sources
    targets = [d for d in domains if d not in sources] if targets is None else targets
    check_names(f"--source and --target of {root} among", (*sources, *targets), domains)
    missing = "--target" if sources else "--source"
    check(sources and targets, f"expected a domain for {missing}, of those of {listed}")
    return sources, targets


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    images = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in KINDS)
    check(images, f"expected images ({', '.join(KINDS)}) in {folder / 'images'}, got none")
    found = [(image, folder / "masks" / f"{image.stem}.png") for image in images]
    for image, mask in found:
        check(mask.is_file(), f"expected a mask for {image} at {mask}, found none")
    return found


def read_sites(root: Path, height: int, limit: int | None = None) -> Scenes:
    """Read SITE/{train,test}/{images,masks} of a folder or a zip of it, whole images and masks 0/1.

    Of each site's training images the last fifth, by name, validates. Images keep their shape;
    narrower ones are padded on the right with black, that is ignored.
    """
    images, masks, numbers = [], [], []
    with decoding.opened(root) as root:
        sites = sorted(p.parents[1].name for p in root.glob("*/train/images") if p.is_dir())
        expected = "expected --data to hold two sites or more, SITE/train/images/NAME.png"
        check(len(sites) > 1, f"{expected}, got {', '.join(sites) or 'none'} at {root}")
        for number, part in product(range(len(sites)), (TRAIN, TEST)):
            found = pairs(root / sites[number] / ("test" if part == TEST else "train"))[:limit]
            last = max(1, len(found) // 5) if part == TRAIN else 0
            for index, (image, mask) in enumerate(found):
                with Image.open(image) as opened:
                    size = round(opened.width * height / opened.height), height
                images.append(decode([image], size, workers=1)[0])
                masks.append(read_mask(image, mask, size))
                numbers.append((number, VALID if index >= len(found) - last > 0 else part))
    check(max(mask.max() for mask in masks) == 1, f"expected masks of 0 and 1 under {root}")
    widest = max(mask.shape[1] for mask in masks)
    wide = torch.stack([F.pad(image, (0, widest - image.shape[2])) for image in images])
    flat = [F.pad(mask, (0, widest - mask.shape[1]), value=IGNORED) for mask in masks]
    domains, parts = torch.tensor(numbers).T
    whole = Augmentation(side=(1.0, 1.0), shift=0.0, flip=True)
    return Scenes(wide, torch.stack(flat), domains, parts, sites, [], 2, whole)


def read_mask(image: Path, mask: Path, size: tuple[int, int]) -> Tensor:
    """Read a mask as uint8 (H, W), of this width and height."""
    try:
        with Image.open(mask) as opened, Image.open(image) as beside:
            one = "expected a mask of one channel of 8 bits (mode L or P)"
            fine, got = opened.mode in ("L", "P", "1"), f"got mode {opened.mode} in {mask}"
            check(fine, f"{one}, {got}; save class numbers, not colours")
            expected = f"expected the mask {mask} to have its image's size {beside.size}"
            check(opened.size == beside.size, f"{expected}, got {opened.size}")
            fitted = ImageOps.fit(opened, size, Image.Resampling.NEAREST)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {mask} or {image}: {error}") from error
    return torch.from_numpy(np.array(fitted).astype(np.uint8))
