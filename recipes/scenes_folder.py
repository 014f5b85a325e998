"""Images and masks by domain: DIR/DOMAIN/images/NAME.png (or .jpg), DIR/DOMAIN/masks/NAME.png.

A pixel of a mask is its class, 255 where there is none. Both are resized and centre-cropped to a
square, masks by nearest neighbour.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from . import decoding
from .data import Augmentation, stratified_mask
from .errors import RecipeError, check_names
from .folders import decode
from .scenes import IGNORED, TEST, TRAIN, VALID, Scenes

KINDS = (".png", ".jpg", ".jpeg")
LEAST = 4  # scenes of a source, so that each part has one


def read_scenes(
    root: Path,
    sources: Sequence[str] | None,
    targets: Sequence[str] | None,
    size: int,
    limit: int | None = None,
) -> Scenes:
    """Read a folder; every scene of a source trains until `split`."""
    if not root.is_dir():
        raise RecipeError(f"expected --data to be a folder DOMAIN/images/NAME.png, none at {root}")
    domains = sorted(path.name for path in root.iterdir() if (path / "images").is_dir())
    sources, targets = choose(root, domains, sources, targets)
    paths: list[tuple[Path, Path]] = []
    of: list[int] = []
    for number, name in enumerate((*sources, *targets)):
        found = pairs(root / name)[:limit]
        if number < len(sources) and len(found) < LEAST:
            raise RecipeError(
                f"expected {LEAST} images or more to train, validate and test on {name!r}, "
                f"got {len(found)}"
            )
        paths += found
        of += [number] * len(found)
    masks = torch.stack([read_mask(image, mask, size) for image, mask in paths])
    images = decode([image for image, _ in paths], size, workers=2)
    number = torch.tensor(of)
    known = masks[masks != IGNORED]
    classes = int(known.max()) + 1 if len(known) else 0
    if classes < 2:
        raise RecipeError(f"expected masks of two classes or more under {root}, got {classes}")
    return Scenes(
        images,
        masks,
        number,
        torch.where(number < len(sources), TRAIN, TEST),
        list(sources),
        list(targets),
        classes,
        Augmentation(side=(0.6, 1.0), shift=0.0, flip=True),
    )


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
    root: Path, domains: Sequence[str], sources: Sequence[str] | None, targets: Sequence[str] | None
) -> tuple[Sequence[str], Sequence[str]]:
    """Fill in what was not named, and check what was."""
    listed = ", ".join(domains) or "none"
    if sources is None and targets is None:
        raise RecipeError(f"expected --source or --target of the domains of {root}: {listed}")
    sources = [d for d in domains if d not in targets] if sources is None else sources
    targets = [d for d in domains if d not in sources] if targets is None else targets
    for option, names in (("--source", sources), ("--target", targets)):
        check_names(f"{option} of {root} among", names, domains)
        if not names:
            raise RecipeError(f"expected a domain for {option}; {root} has {listed}")
    check_names("domains among", (*sources, *targets), domains)
    return sources, targets


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    """List the images of a domain with their masks."""
    images = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in KINDS)
    if not images:
        raise RecipeError(f"expected images ({', '.join(KINDS)}) in {folder / 'images'}, got none")
    found = [(image, folder / "masks" / f"{image.stem}.png") for image in images]
    for image, mask in found:
        if not mask.is_file():
            raise RecipeError(f"expected a mask for {image} at {mask}, found none")
    return found


def read_sites(root: Path, height: int, limit: int | None = None) -> Scenes:
    """Read SITE/{train,test}/{images,masks} of a folder or a zip of it, whole images and masks 0/1.

    Of each site's training images the last fifth, by name, validates. Images keep their shape;
    narrower ones are padded on the right with black, that is ignored.
    """
    if zipfile.is_zipfile(root):
        with TemporaryDirectory() as folder:
            decoding.unpack(root, Path(folder, root.name), workers=1)
            return read_sites(Path(folder, root.name), height, limit)
    sites = sorted(p.parents[1].name for p in root.glob("*/train/images") if p.is_dir())
    if len(sites) < 2:
        raise RecipeError(
            f"expected --data to hold two sites or more, SITE/train/images/NAME.png, got "
            f"{', '.join(sites) or 'none'} at {root}"
        )
    images, masks, numbers = [], [], []
    for number, part in product(range(len(sites)), (TRAIN, TEST)):
        found = pairs(root / sites[number] / ("test" if part == TEST else "train"))[:limit]
        last = max(1, len(found) // 5) if part == TRAIN else 0
        for index, (image, mask) in enumerate(found):
            with Image.open(image) as opened:
                size = round(opened.width * height / opened.height), height
            images.append(decode([image], size, workers=1)[0])
            masks.append(read_mask(image, mask, size))
            numbers.append((number, VALID if index >= len(found) - last > 0 else part))
    if not torch.cat([m.flatten() for m in masks]).max() == 1:
        raise RecipeError(f"expected masks of 0 and 1 under {root}")
    widest = max(mask.shape[1] for mask in masks)
    wide = [F.pad(image, (0, widest - image.shape[2])) for image in images]
    flat = [F.pad(mask, (0, widest - mask.shape[1]), value=IGNORED) for mask in masks]
    domains, parts = torch.tensor(numbers).T
    whole = Augmentation(side=(1.0, 1.0), shift=0.0, flip=True)
    return Scenes(torch.stack(wide), torch.stack(flat), domains, parts, sites, [], 2, whole)


def read_mask(image: Path, mask: Path, size: int | tuple[int, int]) -> Tensor:
    """Read a mask as uint8 (H, W), of a square's size, or of width and height."""
    width, height = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(mask) as opened, Image.open(image) as beside:
            if opened.mode not in ("L", "P", "1"):
                raise RecipeError(
                    f"expected a mask of one channel of 8 bits (mode L or P), got mode "
                    f"{opened.mode} in {mask}; save class numbers, not colours"
                )
            if opened.size != beside.size:
                raise RecipeError(
                    f"expected the mask {mask} to have its image's size {beside.size}, "
                    f"got {opened.size}"
                )
            fitted = ImageOps.fit(opened, (width, height), Image.Resampling.NEAREST)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {mask} or {image}: {error}") from error
    return torch.from_numpy(np.array(fitted).astype(np.uint8))
