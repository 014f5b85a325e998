"""A loader whose features are read once or several times, in the same order each time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from normswap.contexts.cluster_assigners import ClusterAssigner
from normswap.contexts.features import Extractor, Features, targets_of
from normswap.contexts.tally import Tally
from normswap.errors import ContextError
from normswap.util.arguments import check_count
from normswap.util.batches import Reservoir, show_progress, undisturbed

A = TypeVar("A", bound=ClusterAssigner)
# The squares of larger ones overflow float32.
LARGEST = 1e15


@dataclass(eq=False)
class LoaderFeatures:
    """The features of a loader's batches, and a uniform sample of them.

    Arguments are those of `normswap.contexts.kmeans`; torch's generators start from the seed, too,
    while the loader is read.
    """

    loader: Iterable[Any]
    features: Features
    num_contexts: int
    samples: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        check_count("num_contexts", self.num_contexts, error=ContextError)
        check_count("seed", self.seed, 0, 2**32 - 1, ContextError)
        check_count("samples", self.samples, self.num_contexts, error=ContextError)
        if isinstance(self.loader, Tensor) or not isinstance(self.loader, Iterable):
            raise ContextError(
                f"expected a loader that yields batches, got {type(self.loader).__name__}; give a "
                "DataLoader, or a list of batches"
            )
        self.extractor = Extractor(self.features)
        self.kept = Reservoir(self.samples, torch.Generator().manual_seed(self.seed))
        self.targets: list[Tensor | None] = []

    def read(self, title: str, use: Callable[[Tensor, Tensor | None], None]) -> None:
        """Hand the features and, if they come with them, the classes of each batch to `use`.

        Raises:
            ContextError: features that are not finite.
        """
        with undisturbed(seed=self.seed):
            bar = show_progress(self.loader, title, progress=self.progress)
            for number, batch in enumerate(bar):
                x = self.extractor(batch).cpu()
                bad = int((~(x.abs() < LARGEST).all(1)).sum())
                if bad:
                    raise ContextError(
                        f"expected finite features, below {LARGEST:g}, got {bad} of {len(x)} "
                        f"samples with others in batch {number}; clean or leave out these inputs"
                    )
                targets = targets_of(batch)
                use(x, targets if targets is not None and len(targets) == len(x) else None)

    def sample(self) -> Tensor:
        """Read the loader once; return a uniform sample of its features, (kept, D).

        Raises:
            ContextError: no batch, fewer samples than contexts, or more than the sample holds from
                an iterator.
        """
        once = isinstance(self.loader, Iterator)

        def keep(x: Tensor, targets: Tensor | None) -> None:
            self.kept.add(len(x), lambda index: x[index])
            self.targets.append(targets)
            if once and not self.kept.complete:
                raise ContextError(
                    f"expected a loader that can be read again, for it holds more than samples="
                    f"{self.kept.size}, got an iterator; give a DataLoader or a list, or more "
                    "samples="
                )

        self.read("sample", keep)
        if self.kept.rows is None or self.kept.seen < self.num_contexts:
            raise ContextError(
                f"expected at least {self.num_contexts} samples, one a context, got "
                f"{self.kept.seen}"
            )
        return self.kept.rows

    def count(self, assigner: A) -> A:
        """Count the contexts of the whole set, and return the assigner with them.

        Raises:
            ContextError: the loader gave another number of samples than before.
        """
        tally = Tally(self.num_contexts)
        if self.kept.complete and self.kept.rows is not None:
            known = [t for t in self.targets if t is not None]
            classes = torch.cat(known) if len(known) == len(self.targets) else None
            tally.add(assigner.assign(self.kept.rows), classes)
        else:
            self.read("count", lambda x, targets: tally.add(assigner.assign(x), targets))
        assigner.counts = tally.result()
        if sum(assigner.sizes) != self.kept.seen:
            raise ContextError(
                f"expected the loader to give {self.kept.seen} samples each time it is read, got "
                f"{sum(assigner.sizes)}; give one that starts anew"
            )
        return assigner
