"""What measurements of a model's rows found, and for which calls it holds."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

ONE, FOLDED, REPEATED, PERMUTED = "one per sample", "folded", "repeated", "permuted"
# All labels are the same one: any order will do.
ANY = "any"
RAISES = "the model raises on other samples"
NO_SAMPLE, UNSURE = "rows from no sample", "rows that do not tell their sample"
# Rows that no sample moves (dead activations): in the order of the batch, for this call alone.
DEAD = "alike in all samples"

# After so many equal findings for other sizes and numbers, these no longer matter.
_ENOUGH = 3


@dataclass
class Step:
    """A call of a norm in a run of a model.

    Attributes:
        site: name of the norm.
        training: whether it was in training mode.
        rows: how many it was given.
        how: how rows follow from samples: one of the constants; "" where nothing tells.
        times: rows a sample, where regular; None for any number.
        index: the sample of each row, (rows,), where permuted.
        cause: what keeps rows from following samples.
    """

    site: str
    training: bool
    rows: int
    how: str = ""
    times: int | None = None
    index: Tensor | None = None
    cause: str = ""

    @property
    def regular(self) -> bool:
        """Whether it holds for any number of samples."""
        return not self.cause and self.how in (ONE, FOLDED, REPEATED)

    @property
    def blind(self) -> bool:
        """Whether samples moved some rows too little to tell whose they are."""
        return self.how == DEAD or NO_SAMPLE in self.cause or UNSURE in self.cause

    def fits(self, site: str, rows: int, samples: int) -> bool:
        """Return whether it stands for a norm that is given so many rows."""
        if site != self.site or not self.regular:
            return site == self.site and rows == self.rows
        if self.times is None:
            return rows == samples if self.how == ONE else rows > 0 and rows % samples == 0
        return rows == self.times * samples

    def agrees(self, other: "Step") -> bool:
        """Return whether another call of the norm has its rows in the same order."""
        if self.index is None or other.index is None or self.rows != other.rows:
            return self.how == other.how
        return torch.equal(self.index, other.index)

    def __str__(self) -> str:
        """Return the words of a summary."""
        return self.cause or (
            self.how if self.how in (ONE, PERMUTED) else f"{self.how} x{self.times}"
        )


@dataclass
class RowPlan:
    """The norms a run of the model meets, in order, and how their rows follow from the samples.

    Attributes:
        steps: the calls of norms.
        samples: the one number of samples it holds for; None for any that `holds` says.
        measured: on how many samples; 0 where operators told.
        reason: why nothing was measured; "" where it was.
    """

    steps: list[Step] = field(default_factory=list)
    samples: int | None = None
    measured: int = 0
    reason: str = ""

    def holds(self, samples: int) -> bool:
        """Return whether it may stand for a call with so many samples.

        Of as many samples as one group has, no order shows that groups of them are transposed.
        """
        if self.samples is not None:
            return samples == self.samples
        return self.measured in (0, samples) or samples % self.measured > 0

    @property
    def regular(self) -> bool:
        """Whether it may hold for other calls."""
        return not self.reason and all(step.regular for step in self.steps)

    def is_square(self, count: int) -> bool:
        """Return whether some norm has a multiple of `count` rows for each of `count` samples."""
        return self.measured > 0 and any(step.rows % count**2 == 0 for step in self.steps)

    def agrees(self, other: "RowPlan") -> bool:
        """Return whether another number of samples gave the same orders, as far as it tells."""
        pairs = zip(self.steps, () if other.reason else other.steps, strict=False)
        same = takewhile(lambda pair: pair[0].site == pair[1].site, pairs)
        return all((a.how, a.times, a.cause) == (b.how, b.times, b.cause) for a, b in same)

    @property
    def fails(self) -> bool:
        """Whether another way to run the model may tell more."""
        return RAISES in self.reason or any(step.blind for step in self.steps)

    @property
    def told(self) -> bool:
        """Whether it tells of every row whose it is."""
        return bool(self.steps) and not any(step.cause or step.blind for step in self.steps)

    def explains(self, other: "RowPlan") -> bool:
        """Return whether it tells of all rows, and as another does of those that it could tell."""
        here, there = ([(s.site, s.rows) for s in plan.steps] for plan in (self, other))
        pairs = zip(self.steps, other.steps, strict=False)
        return self.told and here == there and all(b.blind or a.agrees(b) for a, b in pairs)

    def step(self, at: int, site: str, rows: int, samples: int) -> Step | None:
        """Return what it says of the norm met at a place of the sequence; None if another."""
        step = self.steps[at] if at < len(self.steps) else None
        return step if step is not None and step.fits(site, rows, samples) else None

    def follow(self, path: list[tuple[str, int]], samples: int) -> Step | None:
        """Return what it says of the last norm of a path; None where it met others before."""
        steps = [self.step(at, *met, samples) for at, met in enumerate(path)]
        return None if None in steps else steps[-1]


@dataclass
class Family:
    """What was measured for calls that differ in sizes and numbers only.

    Attributes:
        plans: by sizes and numbers, the newest first; by None those declared to hold for any.
        general: for those not met yet, once enough others were found alike.
        detours: how many runs met norms in a sequence that no measurement followed.
    """

    plans: dict[Hashable, list[RowPlan]] = field(default_factory=dict)
    general: RowPlan | None = None
    detours: int = 0

    def find(self, numbers: Hashable, samples: int) -> list[RowPlan]:
        """Return the plans that may hold, the likeliest first."""
        kept = [*self.plans.get(numbers, ()), *self.plans.get(None, ())]
        general = [] if self.general is None else [self.general]
        found = [p for p in kept if p.holds(samples)]
        return found or [p for p in general if p.holds(samples)]

    def keep(self, numbers: Hashable, plan: RowPlan) -> None:
        """Keep a plan; make the general one where enough of them are alike."""
        self.plans.setdefault(numbers, []).insert(0, plan)
        shapes = {
            None if p.samples or p.reason else tuple((s.site, s.how) for s in p.steps)
            for found in self.plans.values()
            for p in found
        }
        if len(self.plans) >= _ENOUGH and len(shapes) == 1 and None not in shapes:
            steps = [Step(s.site, s.training, 0, s.how) for s in plan.steps]
            self.general = RowPlan(steps, measured=plan.measured)
