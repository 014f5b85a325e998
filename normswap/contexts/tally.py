"""How many samples each context has, and how much it tells of their target."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from normswap.errors import ContextError
from normswap.util.arguments import listed

# Fewer samples than a usual half batch, or than a tenth of an even share, are few to estimate
# statistics from, and most batches will hold none of them.
FEW_SAMPLES = 32
FEW_SHARE = 0.1
# Of the entropy of contexts (or of targets, if less): above it, the context gives the target away.
LEAK = 0.25


@dataclass(frozen=True)
class LabelCounts:
    """What a tally found.

    Attributes:
        sizes: samples of each context.
        unknown: samples without a context.
        leak: `mutual_information` of context and target; None where no targets are known.
        excess: the same beyond what chance alone makes of a sample of this size.
    """

    sizes: tuple[int, ...]
    unknown: int = 0
    leak: float | None = None
    excess: float = 0.0


class Tally:
    """Counts of contexts, and of contexts with targets, over a stream of labels."""

    def __init__(self, num_contexts: int) -> None:
        self.num_contexts = num_contexts
        self.sizes = [0] * num_contexts
        self.unknown = 0
        self.pairs: Counter[tuple[int, Any]] = Counter()

    def add(self, labels: Tensor, targets: Sequence[Any] | Tensor | None = None) -> None:
        """Count labels (N,) in [-1, K), and the targets they stand with.

        Raises:
            ContextError: labels out of range, or another number of targets.
        """
        values = torch.as_tensor(labels, device="cpu").tolist()
        if any(not -1 <= value < self.num_contexts for value in values):
            raise ContextError(f"expected labels in [-1, {self.num_contexts}), got {labels}")
        counts = Counter(values)
        self.unknown += counts.pop(-1, 0)
        self.sizes = [size + counts[k] for k, size in enumerate(self.sizes)]
        if targets is None:
            return
        given = targets.tolist() if isinstance(targets, Tensor) else list(targets)
        if len(given) != len(values):
            raise ContextError(
                f"expected as many targets as labels, {len(values)}, got {len(given)}; give the "
                "labels of the same samples: report(targets, labels=assigner(batch))"
            )
        pairs = zip(values, given, strict=True)
        self.pairs.update((c, t) for c, t in pairs if c >= 0 and t is not None)

    def result(self) -> LabelCounts:
        """Return the counts so far."""
        sizes = tuple(self.sizes)
        if not self.pairs:
            return LabelCounts(sizes, self.unknown)
        leak, excess = (mutual_information(self.pairs, corrected=c) for c in (False, True))
        return LabelCounts(sizes, self.unknown, leak, excess)


def mutual_information(pairs: Counter[tuple[int, Any]], corrected: bool = False) -> float:
    """Return ``I(C; Y) / min(H(C), H(Y))`` of a table of counts, in [0, 1]; 0 where H is 0.

    1 where one of the two determines the other, as a superclass is determined by its class.

    Args:
        pairs: (context, target) -> count.
        corrected: take ``(K - 1)(T - 1) / 2N`` from I, which independent samples have in the mean.
    """
    total = sum(pairs.values())
    of_context: Counter[int] = Counter()
    of_target: Counter[Any] = Counter()
    for (context, target), count in pairs.items():
        of_context[context] += count
        of_target[target] += count
    each = [_entropy(counts.values(), total) for counts in (of_context, of_target)]
    shared, least = sum(each) - _entropy(pairs.values(), total), min(each)
    if corrected:
        shared -= (len(of_context) - 1) * (len(of_target) - 1) / (2 * total)
    return 0.0 if least <= 0 else min(max(shared / least, 0.0), 1.0)


def _entropy(counts: Iterable[int], total: int) -> float:
    return -sum(n / total * math.log(n / total) for n in counts)


@dataclass(frozen=True)
class ContextReport:
    """What is known of contexts before training. ``str(report)`` is a table and the warnings.

    Attributes:
        names: of the contexts.
        sizes: samples of each; () where none were counted.
        unknown: samples without a context.
        leak: how much of context and target determine each other, see `mutual_information`; None
            where no targets are known.
        warnings: what may mislead, a sentence each.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    unknown: int
    leak: float | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Return the table, the leak and the warnings."""
        lines = []
        if self.sizes:
            total = max(sum(self.sizes), 1)
            cells = [
                [name, f"{size:,}", f"{100 * size / total:.1f}"]
                for name, size in zip(self.names, self.sizes, strict=True)
            ]
            if self.unknown:
                cells.append(["(unknown)", f"{self.unknown:,}", ""])
            headers = ["context", "samples", "%"]
            align = ("left", "right", "right")
            lines.append(tabulate(cells, headers, "simple", disable_numparse=True, colalign=align))
        else:
            lines.append(f"{len(self.names)} contexts, no samples counted: {listed(self.names, 6)}")
        if self.leak is not None:
            lines.append(f"context and target: normalised mutual information {self.leak:.2f}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def describe_tiny(names: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Return a warning of tiny contexts, if there are any."""
    # Fewer than a tenth of an even share, too.
    least = max(FEW_SAMPLES, FEW_SHARE * sum(sizes) / max(len(sizes), 1))
    tiny = [k for k, size in enumerate(sizes) if size < least]
    if not tiny:
        return []
    shown = listed([f"{names[k]} ({sizes[k]})" for k in tiny], 6)
    return [
        f"{len(tiny)} of {len(names)} contexts are tiny, under {FEW_SAMPLES} samples or a tenth of "
        f"an even share: {shown}; their statistics will be poor: merge them, or ask for fewer"
    ]


def describe_leak(counts: LabelCounts) -> list[str]:
    """Return a warning where the context follows the target, if it does."""
    if counts.excess <= LEAK or counts.leak is None:
        return []
    return [
        f"the context gives the target away (normalised mutual information {counts.leak:.2f}, "
        f"above {LEAK}): fed at test time it is a part of the answer; leave the label unknown "
        "there, unless it will truly be known"
    ]
