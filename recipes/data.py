"""Images of several domains in memory, their split, and augmented batches of them.

A data set here is one uint8 tensor: decoded once, indexed ever after. That is quicker than a worker
pool for the sizes a recipe is run on (10,000 images of 112 px are 376 MB), and it makes an epoch a
pure function of the seed and its number, which is what lets a resumed run repeat a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import parallel
from .errors import RecipeError

UNKNOWN = -1
TEST_BATCH = 256


@dataclass(frozen=True)
class Augmentation:
    """Random window of a square image: its side, how far its centre may move, and mirroring.

    All are fractions of the image. A window beyond the image shows its edge drawn out.
    """

    side: tuple[float, float]
    shift: float
    flip: bool


@dataclass(frozen=True)
class DomainData:
    """Labelled images of several domains, with which of them train and which test.

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

    @property
    def contexts(self) -> list[str]:
        """Names of the domains that train: the contexts of the converted model."""
        return [name for name in self.domain_names if name != self.held_out]

    def context_of(self, domains: Tensor) -> Tensor:
        """Map domain indices to context labels; the held-out domain has none and is unknown."""
        table = [
            UNKNOWN if name == self.held_out else self.contexts.index(name)
            for name in self.domain_names
        ]
        return torch.tensor(table)[domains]


@dataclass(frozen=True)
class Batch:
    """Float images ready for a model, with class and context labels, on one device.

    `mixed` holds further versions of the same images, if the loader makes any.
    """

    images: Tensor
    labels: Tensor
    context: Tensor
    mixed: tuple[Tensor, ...] = ()


def stratified_mask(groups: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Pick `fraction` of each group at random, at least one and never all of a group.

    Args:
        groups: (N,) int64, the group of each sample (its class, or its domain and class).
        fraction: share of each group to pick, in (0, 1).
        generator: source of the choice.

    Returns:
        (N,) bool, true where picked.
    """
    picked = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        picked[members[:count]] = True
    return picked


def draw_windows(n: int, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw a window for each of n images: an affine map of coordinates, (n, 2, 3).

    Args:
        n: how many.
        how: the range of the windows.
        generator: a CPU generator; the choice is the same on every device.
    """
    uniform = torch.rand(n, 4, generator=generator)
    low, high = how.side
    side = low + (high - low) * uniform[:, 0]
    # A window smaller than the image may sit anywhere inside it, and `shift` beyond that.
    reach = (1 - side).clamp(min=0) + how.shift
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where((uniform[:, 3] < 0.5) & how.flip, -side, side)
    theta[:, 1, 1] = side
    theta[:, :, 2] = (2 * uniform[:, 1:3] - 1) * reach[:, None]
    return theta


def cut_windows(images: Tensor, windows: Tensor) -> Tensor:
    """Cut a window out of each image (N, C, S, S) and resize it back to the image's size."""
    grid = F.affine_grid(windows, list(images.shape), align_corners=False)
    return F.grid_sample(
        images, grid.to(images.device), "bilinear", padding_mode="border", align_corners=False
    )


class Loader:
    """Makes the batches of a data set: float, normalised, on the device.

    Args:
        data: the images.
        mean: per channel, of pixel values in [0, 1], as timm gives them for the model.
        std: likewise.
        batch_size: samples a batch.
        device: where the batches go.
        mix: makes another version of uint8 images; training batches then carry two in `mixed`.
    """

    def __init__(
        self,
        data: DomainData,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        device: torch.device,
        mix: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.device = device
        self.mix = mix
        self.train_indices = data.train.nonzero().flatten()
        if len(self.train_indices) < parallel.size() or batch_size < parallel.size():
            raise RecipeError(
                f"expected --batch-size, and as many training images, of at least "
                f"{parallel.size()}, one a process, got {batch_size}"
            )
        # An epoch's last, shorter batch is dropped: BatchNorm's statistics would be worse on it.
        self.batches_per_epoch = max(1, len(self.train_indices) // batch_size)
        # A batch of all processes together.
        self.step_size = min(batch_size, len(self.train_indices))
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]

    def batch(
        self,
        indices: Tensor,
        generator: torch.Generator | None = None,
        part: slice = slice(None),
    ) -> Batch:
        """Build the batch of these samples, augmented if a generator is given.

        A part of a batch is drawn as the whole is: its images are those that the whole has there.
        """
        versions = [self.data.images[indices]]
        if generator is not None and self.mix is not None:
            versions += [self.mix(versions[0], generator) for _ in range(2)]
        # Side by side as channels, so that all versions of an image get the same window.
        images = torch.cat(versions, 1)[part].to(self.device).float() / 255
        if generator is not None:
            windows = draw_windows(len(indices), self.data.augmentation, generator)
            images = cut_windows(images, windows[part])
        indices = indices[part]
        clean, *mixed = (self._normalise(v) for v in images.chunk(len(versions), 1))
        return Batch(
            clean,
            self.data.labels[indices].to(self.device),
            self.data.context_of(self.data.domains[indices]).to(self.device),
            tuple(mixed),
        )

    def normalised(self, images: Tensor) -> Tensor:
        """Make uint8 images ready for a model, as they are."""
        return self._normalise(images.to(self.device).float() / 255)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std

    def train_epoch(self, seed: int, epoch: int, whole: bool = False) -> Iterator[Batch]:
        """Give the augmented training batches of an epoch; seed and epoch alone decide them.

        Of several processes each gets its part of every batch, or all of it with `whole`.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = self.train_indices[torch.randperm(len(self.train_indices), generator=generator)]
        for start in range(self.batches_per_epoch):
            indices = order[start * self.batch_size :][: self.batch_size]
            part = slice(None) if whole else parallel.part_of(len(indices))
            yield self.batch(indices, generator, part)

    def domain_test(self, domain: int) -> Iterator[Batch]:
        """Give the test batches of one domain, as they are; of several processes each has some."""
        chosen = (self.data.test & (self.data.domains == domain)).nonzero().flatten()
        for indices in chosen.split(TEST_BATCH)[parallel.rank() :: parallel.size()]:
            yield self.batch(indices)
