"""What was found of the rows of each norm: for calls that no plan tells of, and for summaries."""

from typing import Any

import torch

from normswap.graph.rows.plans import DEAD, ONE, PERMUTED, RowPlan, Step

_MIXED = "rows whose order is another in each of several calls"
_SEVERAL = f"{PERMUTED}, in several orders"


class Findings:
    """The one finding of a norm in a mode, or that there are several.

    Compiled programs, which cannot tell how they got to a norm, go by these.

    Attributes:
        by_ratio: by norm, mode and rows a sample.
        by_number: by norm, mode, rows and samples: where no ratio tells, and orders are fixed.
    """

    def __init__(self) -> None:
        self.by_ratio: dict[tuple[str, bool, float], Step] = {}
        self.by_number: dict[tuple[str, bool, int, int], Step] = {}

    def note(self, plan: RowPlan, samples: int, fixed: bool) -> None:
        """Note what was found with so many samples; irregular orders too where they are fixed."""
        for step in (step for step in plan.steps if step.how != DEAD):
            times = step.times if step.regular else _ratio(step.rows, samples)
            _learn(self.by_ratio, (step.site, step.training, times), step)
            if fixed and not step.regular:
                _learn(self.by_number, (step.site, step.training, step.rows, samples), step)

    def of(self, site: str, training: bool, rows: int, samples: int) -> Step | None:
        """Return what was found of a norm that is given so many rows for so many samples."""
        return self.by_ratio.get((site, training, _ratio(rows, samples)))

    def recall(self, site: str, training: bool, rows: int, samples: int) -> Step | None:
        """Return what may be taken to hold of a norm; None where nothing does."""
        # In a program for any batch the sizes are symbols; their ratio is a number all the same.
        times = 0 if rows % samples else int(rows // samples)
        step = self.by_ratio.get((site, training, times))
        # An order that the other mode has is likely this one's, too.
        other = self.by_ratio.get((site, not training, times))
        if step is None and times == 1 and (other is None or other.regular):
            return Step(site, training, 0, ONE, 1)
        if (step is None or not step.regular) and not isinstance(rows, torch.SymInt):
            step = self.by_number.get((site, training, rows, samples))
        return step

    def describe(self, site: str) -> str:
        """Say for a summary where the rows of a norm come from; "" where nothing was found."""
        steps = (*self.by_ratio.values(), *self.by_number.values())
        # What several orders keep compiled code from is no fault of a run, which measures each.
        words = (_SEVERAL if s.cause == _MIXED else str(s) for s in steps if s.site == site)
        return ", ".join(dict.fromkeys(words))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies keep: all, in dicts of their own."""
        return {name: dict(found) for name, found in self.__dict__.items()}


def _learn(found: dict[Any, Step], key: object, step: Step) -> None:
    """Keep a finding; two that differ are one that labels cannot follow."""
    before = found.get(key)
    if before is None or (before.cause and before.cause != _MIXED):
        found[key] = step
    elif not step.cause and not before.agrees(step):
        found[key] = Step(step.site, step.training, step.rows, cause=_MIXED)


def _ratio(rows: int, samples: int) -> float:
    """Return rows a sample; a whole number as an int, since compiled code tells 1 from 1.0."""
    return rows / samples if rows % samples else rows // samples
