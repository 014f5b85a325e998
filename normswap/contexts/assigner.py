"""What every assigner has: names, labels for unseen data, sizes, priors, a report, files."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor

from normswap.contexts import store
from normswap.contexts.priors import check_priors
from normswap.contexts.tally import ContextReport, LabelCounts, Tally, describe_leak, describe_tiny
from normswap.errors import ContextError, ContextWarning, ConversionError, NormswapError
from normswap.util.arguments import listed

UNKNOWN = -1
_KINDS: dict[str, type["Assigner"]] = {}


class Assigner(ABC):
    """Gives samples their contexts: ``assigner(batch)`` is an int64 tensor (N,), -1 for unknown.

    Give it to ``normswap.convert(model, contexts=assigner)``: the model takes its names and priors.

    Attributes:
        kind: how it decides; stands in its file.
        names: of the contexts, in the order of their labels.
        counts: of the samples it was built from; None where it saw none.
        labels: of the samples it was built from, in their order, (N,); None where no order is
            known, and after loading.
    """

    kind: ClassVar[str]
    # A context that is computed from the input alone cannot tell more than the input does.
    from_input: ClassVar[bool] = False
    caution: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Make the kind known to `load`."""
        if "kind" in vars(cls):
            _KINDS[cls.kind] = cls

    def __init__(self, names: Sequence[str], counts: LabelCounts | None = None) -> None:
        self.names = tuple(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ContextError(f"expected names of contexts, all different, got {names!r}")
        if counts is not None and len(counts.sizes) != len(self.names):
            raise ContextError(f"expected {len(self.names)} sizes, got {len(counts.sizes)}")
        self.counts = counts
        self.labels: Tensor | None = None

    @abstractmethod
    def __call__(self, batch: Any) -> Tensor:
        """Return the context of each sample, (N,) int64, -1 where it is not known.

        Raises:
            ContextError: a batch of another form than this assigner takes.
        """

    @property
    def num_contexts(self) -> int:
        """K."""
        return len(self.names)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each context among those it was built from; () where it saw none."""
        return () if self.counts is None else self.counts.sizes

    @property
    def priors(self) -> Tensor:
        """Share of each context, (K,) float64, as ``convert(priors=)`` takes; uniform if unseen.

        Raises:
            ConversionError: a context without any sample.
        """
        absent = [name for name, size in zip(self.names, self.sizes, strict=False) if not size]
        if absent:
            raise ConversionError(f"no sample of context {', '.join(absent)}: priors are positive")
        return check_priors(self.sizes or None, self.num_contexts)

    def report(
        self, targets: Sequence[Any] | Tensor | None = None, labels: Tensor | None = None
    ) -> ContextReport:
        """Return sizes, how much the contexts tell of the target, and warnings.

        Args:
            targets: class of each sample of `labels`; None in a sequence is left out.
            labels: what this assigner returned for other samples than it was built from; by
                default those it was built from, whose order must then be known.

        Raises:
            ContextError: targets whose samples are not known.
        """
        counts = self.counts
        if targets is not None or labels is not None:
            labels = self.labels if labels is None else labels
            if labels is None:
                raise ContextError(
                    "expected the labels of the samples that have these targets; call "
                    "report(targets, labels=assigner(batch))"
                )
            tally = Tally(self.num_contexts)
            tally.add(labels, targets)
            counts = tally.result()
        texts = [self.caution] if self.caution else []
        if counts is None:
            return ContextReport(self.names, (), 0, None, tuple(texts))
        texts += describe_tiny(self.names, counts.sizes)
        if not self.from_input and not self.caution:
            texts += describe_leak(counts)
        return ContextReport(self.names, counts.sizes, counts.unknown, counts.leak, tuple(texts))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder, for `normswap.contexts.load`; a kill leaves what was there.

        Raises:
            ContextError: the folder cannot be written, or what it holds is no JSON.
        """
        record, arrays = self.state()
        counts = None if self.counts is None else asdict(self.counts)
        record = {"kind": self.kind, "names": list(self.names), "counts": counts, **record}
        store.write(folder, record, arrays)

    def count(self, labels: Tensor, targets: Sequence[Any] | Tensor | None = None) -> None:
        """Note the labels of the samples it is built from, and count them."""
        tally = Tally(self.num_contexts)
        tally.add(labels, targets)
        self.labels, self.counts = labels, tally.result()

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what else a file must hold, as JSON values and arrays."""

    @classmethod
    @abstractmethod
    def restore(
        cls, names: list[str], record: dict[str, Any], arrays: dict[str, Tensor], features: Any
    ) -> "Assigner":
        """Rebuild what `state` described."""

    def warn(self) -> None:
        """Raise the report's warnings as Python warnings, of the caller of the public function."""
        for text in self.report().warnings:
            warnings.warn(text, ContextWarning, stacklevel=3)

    def __repr__(self) -> str:
        """Return kind, names and sizes, shortened."""
        return f"{type(self).__name__}({self.num_contexts} contexts: {listed(self.names, 6)})"


def load(folder: str | os.PathLike[str], features: Any = None) -> Assigner:
    """Return the assigner that was saved in a folder.

    Args:
        folder: where `Assigner.save` wrote.
        features: the model or function whose features it was built on, if it was; a model of other
            weights is refused.

    Raises:
        ContextError: no assigner, a damaged or another file, features missing, superfluous or
            other ones than before.
    """
    record, arrays = store.read(folder)
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ContextError(
            f"expected an assigner of a kind among {', '.join(sorted(_KINDS))} in {folder}, got "
            f"{kind!r}"
        )
    try:
        names, counts = record["names"], record["counts"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names are {names!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"names are {names!r}")
        assigner = _KINDS[kind].restore(names, record, arrays, features)
        if counts is not None:
            sizes = tuple(int(size) for size in counts["sizes"])
            assigner.counts = LabelCounts(**{**counts, "sizes": sizes})
            if len(sizes) != len(names) or min(sizes) < 0:
                raise ValueError(f"sizes are {sizes}")
    except NormswapError:
        raise
    except Exception as error:  # whatever a record of other content makes `restore` raise
        raise ContextError(f"the assigner in {folder} is damaged: {error!r}") from error
    return assigner
