"""Images of several domains in memory, their split, and augmented batches of them.

A data set here is one uint8 tensor: decoded once, indexed ever after. That is quicker than a worker
pool for the sizes a recipe is run on (10,000 images of 112 px are 376 MB), and it makes an epoch a
pure function of the seed and its number, which is what lets a resumed run repeat a whole one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import parallel
from .augment import Augmentation, cut_windows, draw_windows
from .errors import check

UNKNOWN = -1
TEST_BATCH = 256


@dataclass(frozen=True)
class DomainData:
    """Labelled images of several domains, with which of them train and which test.

    `given_split` is whether the data came with what trains and what tests.

    Shape: images (N, 3, S, S) uint8; labels and domains (N,) int64; train and test (N,) bool.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor
    train: Tensor
    test: Tensor
    classes: list[str]
    domain_names: list[str]
    augmentation: Augmentation
    held_out: str | None = None
    note: str = ""
    given_split: bool = False

    @property
    def contexts(self) -> list[str]:
        """Names of the domains that train: the contexts of the converted model."""
        return [name for name in self.domain_names if name != self.held_out]

    def context_of(self, domains: Tensor) -> Tensor:
        """Map domain indices to context labels; the held-out domain has none and is unknown."""
        numbers = {name: i for i, name in enumerate(self.contexts)}
        return torch.tensor([numbers.get(name, UNKNOWN) for name in self.domain_names])[domains]


@dataclass(frozen=True)
class Batch:
    """Float images ready for a model, their labels, and versions of them if any are made."""

    images: Tensor
    labels: Tensor
    context: Tensor
    mixed: tuple[Tensor, ...] = ()


def stratified_mask(groups: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Mark `fraction` of each group at random, at least one and never all: (N,) bool."""
    picked = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        picked[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return picked


def validation(data: DomainData, groups: Tensor | None = None) -> DomainData:
    """Let a fifth of the training images of each group (class) test in place of those that do."""
    groups = torch.where(data.train, data.labels if groups is None else groups, -1)
    chosen = data.train & stratified_mask(groups, 0.2, torch.Generator().manual_seed(0))
    return replace(data, train=data.train & ~chosen, test=chosen)


class Loader:
    """Makes the batches of a data set: float, normalised, on the device.

    `mean` and `std` are of pixel values in [0, 1], as timm gives them for the model. `mix` makes
    another version of uint8 images; training batches then carry two in `mixed`.
    """

    def __init__(
        self, data: DomainData, mean: tuple[float, ...], std: tuple[float, ...], batch_size: int,
        device: torch.device, mix: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.data, self.mean, self.batch_size = data, mean, batch_size
        self.device, self.mix = device, mix
        self.train_indices = data.train.nonzero().flatten()
        # A batch of all processes together.
        self.step_size = min(batch_size, len(self.train_indices))
        check(
            self.step_size >= parallel.size(),
            f"expected --batch-size, and as many training images, of at least {parallel.size()}, "
            f"one a process, got {batch_size}",
        )
        # An epoch's last, shorter batch is dropped: BatchNorm's statistics would be worse on it.
        self.batches_per_epoch = max(1, len(self.train_indices) // batch_size)
        self._mean, self._std = (torch.tensor(x, device=device)[:, None, None] for x in (mean, std))

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None, part: slice = slice(None)
    ) -> Batch:
        """Build a batch of these samples, augmented by a generator; a part is drawn as a whole."""
        versions = [self.data.images[indices]]
        if generator is not None and self.mix is not None:
            versions += [self.mix(versions[0], generator) for _ in range(2)]
        images = self.normalised(torch.cat(versions, 1), generator, part)
        clean, *mixed = images.chunk(len(versions), 1)
        labels = self.data.labels[indices[part]].to(self.device)
        context = self.data.context_of(self.data.domains[indices[part]]).to(self.device)
        return Batch(clean, labels, context, tuple(mixed))

    def normalised(
        self, images: Tensor, generator: torch.Generator | None = None, part: slice = slice(None)
    ) -> Tensor:
        """Make uint8 images ready for a model; versions side by side as channels get one window."""
        count = len(images)
        images = images[part].to(self.device).float() / 255
        if generator is not None:
            windows = draw_windows(count, self.data.augmentation, generator)
            images = cut_windows(images, windows[part])
        return ((images.unflatten(1, (-1, 3)) - self._mean) / self._std).flatten(1, 2)

    def train_epoch(self, seed: int, epoch: int, whole: bool = False) -> Iterator[Batch]:
        """Give the augmented training batches of an epoch; seed and epoch alone decide them.

        Of several processes each gets its part of every batch, or all of it with `whole`.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = self.train_indices[torch.randperm(len(self.train_indices), generator=generator)]
        for indices in order.split(self.batch_size)[: self.batches_per_epoch]:
            part = slice(None) if whole else parallel.part_of(len(indices))
            yield self.batch(indices, generator, part)

    def test_indices(self, domain: int | None = None) -> Tensor:
        test = self.data.test
        return (test if domain is None else test & (self.data.domains == domain)).nonzero()[:, 0]

    def whole(self, indices: Tensor) -> Iterator[Batch]:
        """Give batches of images as they are; of several processes each has some."""
        for part in indices.split(TEST_BATCH)[parallel.rank() :: parallel.size()]:
            yield self.batch(part)
