"""What measurements of a model's rows found, and for which calls it holds."""

from dataclasses import dataclass, field
from typing import Any

from normswap.graph.measure import Step

# After so many equal findings for other sizes and numbers, these no longer matter.
_ENOUGH = 3


@dataclass
class Plan:
    """The norms a run of the model meets, in order, and how their rows follow from the samples.

    Attributes:
        steps: the calls of norms.
        samples: the one number of samples it holds for; None for any.
        reason: why nothing was measured; "" where it was.
    """

    steps: list[Step]
    samples: int | None = None
    reason: str = ""

    @property
    def regular(self) -> bool:
        """Whether it may hold for other calls."""
        return not self.reason and all(step.regular for step in self.steps)

    def is_square(self, count: int) -> bool:
        """Return whether some norm has a multiple of `count` rows for each of `count` samples."""
        return any(step.rows % count**2 == 0 for step in self.steps)

    def step(self, at: int, site: str, rows: int, samples: int) -> Step | None:
        """Return what it says of the norm met at a place of the sequence; None if another."""
        step = self.steps[at] if at < len(self.steps) else None
        return step if step is not None and step.fits(site, rows, samples) else None


@dataclass
class Family:
    """What was measured for calls that differ in sizes and numbers only.

    Attributes:
        plans: regular ones, by sizes and numbers.
        general: for those not met yet, once enough others were found alike.
        fixed: irregular ones that are taken to hold for more than one call.
        steps: regular ones of all plans, by sizes and numbers, norm and rows a sample.
        detours: how many runs met norms in a sequence that no measurement followed.
    """

    plans: dict[Any, list[Plan]] = field(default_factory=dict)
    general: Plan | None = None
    fixed: list[Plan] = field(default_factory=list)
    steps: dict[Any, Step] = field(default_factory=dict)
    detours: int = 0

    def find(self, numbers: Any, samples: int) -> list[Plan]:
        """Return the plans that may hold, the likeliest first."""
        found = [p for p in self.plans.get(numbers, ()) if p.samples in (None, samples)]
        if not found and self.general is not None:
            found = [self.general]
        return [*found, *(p for p in self.fixed if p.samples == samples)]

    def keep(self, numbers: Any, plan: Plan) -> None:
        """Keep a plan; make the general one where enough of them are alike."""
        self.plans.setdefault(numbers, []).insert(0, plan)
        shapes = {
            None if p.samples or p.reason else tuple((s.site, s.how) for s in p.steps)
            for found in self.plans.values()
            for p in found
        }
        if len(self.plans) >= _ENOUGH and len(shapes) == 1 and None not in shapes:
            self.general = Plan([Step(s.site, s.training, 0, s.how) for s in plan.steps])
