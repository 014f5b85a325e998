"""Small images, and a small network for them: what several recipes train by default.

A tile is cut from one of twelve photographs; which, is the class. Half of the tiles test. With
--data they are the images of a folder that says which of them train and which test.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from . import grid, images, methods
from .augment import Augmentation
from .data import DomainData, Loader, stratified_mask, validation
from .errors import check
from .options import ByData, Parser
from .training import fill_statistics
from .weights import SCRATCH, make_backbone

# Those of scikit-image's wheel with detail nearly everywhere.
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina"),
)
TILES = 200
MEAN, STD = 0.5, 0.25  # of pixels, as the network from scratch takes them


def load(options: Namespace, seed: int) -> DomainData:
    """Cut the tiles, or load a folder of the images that train and of those that test."""
    if options.data is None:
        return tiles(options.image_size, seed, options.limit or TILES)
    data = images.load(options)
    expected = f"expected --data {options.data} to hold the folders train and test, of CLASS/image"
    check(data.given_split, f"{expected}, got {', '.join(data.domain_names)}")
    return data


def tiles(size: int, seed: int, limit: int) -> DomainData:
    """Cut photographs into tiles; give so many of each at most to train, and as many to test."""
    from skimage import data

    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name in PHOTOGRAPHS:
        picture = torch.from_numpy(np.atleast_3d(getattr(data, name)())).permute(2, 0, 1)
        cut = picture.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).transpose(0, 1)
        chosen = torch.randperm(len(cut), generator=generator)[: 2 * limit]
        parts.append(cut[chosen].expand(-1, 3, -1, -1))
    labels = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    test = stratified_mask(labels, 0.5, generator)
    how = Augmentation(side=(0.8, 1.0), shift=0.0, flip=True)
    same = torch.zeros_like(labels)
    return DomainData(torch.cat(parts), labels, same, ~test, test, [*PHOTOGRAPHS], ["all"], how)


def network(classes: int, width: int = 16) -> nn.Module:
    blocks = [BasicBlock(width, width)]
    for channels in (width, 2 * width):
        skip = downsample_conv(channels, 2 * channels, 1, stride=2)
        blocks.append(BasicBlock(channels, 2 * channels, stride=2, downsample=skip))
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)
    return nn.Sequential(*stem, *blocks, *head)


def start(data: DomainData, config: Namespace, contexts: Sequence[str]) -> tuple[nn.Module, Loader]:
    """Make the converted network that a training starts from, and what makes its batches.

    A training that tries a rate is tested on a part of the images that train.
    """
    data = data if config.final else validation(data)
    torch.manual_seed(config.seed)
    model, mean, std = network(len(data.classes)), (MEAN,) * 3, (STD,) * 3
    if config.weights != SCRATCH:
        model, _ = make_backbone(config.model, len(data.classes), weights=config.weights)
        mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
    model.to(config.device)
    loader = Loader(data, mean, std, config.batch_size, config.device)
    if config.method == "cn-x" and config.weights == SCRATCH:
        fill_statistics(model, loader, config.seed)
    model = methods.convert(model, config.method, contexts)
    return model.to(memory_format=torch.channels_last), loader


def source(options: Namespace) -> Callable[[Namespace], DomainData]:
    """Give what gives the images of a seed; those of a folder are the same for all."""
    loaded = grid.Latest(lambda seed: load(options, seed))
    return lambda config: loaded(0 if options.data else config.seed)


def add_options(parser: Parser, methods: Sequence[str], known: Sequence[str]) -> None:
    grid.add_methods(parser, methods, known)
    parser.share("data", "limit", "tune", "amp", flip=True, batch_size=64)
    parser.share(image_size=ByData(16, 32))
