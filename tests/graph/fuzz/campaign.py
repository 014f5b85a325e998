"""Many programs: generated from a seed, judged one after another, failures grouped by kind."""

import collections
import functools
import gc
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.graph.fuzz.constructs import CONSTRUCTS
from tests.graph.fuzz.generate import programs
from tests.graph.fuzz.judge import MODES, judge
from tests.graph.fuzz.program import Program
from tests.graph.fuzz.verdict import Failure, Verdict

_KEPT = 4


@dataclass
class Tally:
    """What became of many programs.

    Attributes:
        status: how many were right, refused, invalid (the original itself fails), wrong.
        containers: how many were traced, and scoped, by reason.
        refusals, invalid: how often each was met; errors of the original.
        failed, failures: how many failed, and the smallest few of them, by kind.
    """

    status: collections.Counter = field(default_factory=collections.Counter)
    containers: collections.Counter = field(default_factory=collections.Counter)
    refusals: collections.Counter = field(default_factory=collections.Counter)
    invalid: collections.Counter = field(default_factory=collections.Counter)
    failed: collections.Counter = field(default_factory=collections.Counter)
    failures: dict[str, list[Program]] = field(default_factory=dict)

    def add(self, program: Program, verdict: Verdict) -> None:
        """Count a program."""
        self.containers["traced"] += verdict.traced
        self.containers.update(f"scoped: {reason}" for reason in verdict.scoped.values())
        self.refusals.update({_short(refusal) for refusal in verdict.refusals})
        self.status[verdict.status] += 1
        if verdict.status == "invalid":
            self.invalid[verdict.invalid[:150]] += 1
        untraced = {f.kind.removeprefix("un") for f in verdict.failures if f.kind[:2] == "un"}
        for failure in verdict.failures:
            if failure.kind not in untraced:
                self.failed[failure.kind] += 1
                self._keep(failure.kind, program)

    def _keep(self, kind: str, program: Program) -> None:
        found = [*self.failures.get(kind, []), program]
        self.failures[kind] = sorted(found, key=lambda p: len(str(p)))[:_KEPT]

    def merge(self, other: "Tally") -> None:
        """Add another tally."""
        for name in ("status", "containers", "refusals", "invalid", "failed"):
            getattr(self, name).update(getattr(other, name))
        for kind, found in other.failures.items():
            for program in found:
                self._keep(kind, program)

    def __str__(self) -> str:
        """The counts, as lines."""
        lines = ["programs: " + ", ".join(f"{n} {k}" for k, n in self.status.most_common())]
        for title, counter in (
            ("containers", self.containers),
            ("refusals", self.refusals),
            ("invalid", self.invalid),
            ("failures", self.failed),
        ):
            lines += [f"{title}:", *(f"  {n:6d}  {k}" for k, n in counter.most_common())]
        return "\n".join(lines)


def _short(refusal: str) -> str:
    return re.sub(r"\b[a-z]+\d+(\.\w+)*|\d+", "#", refusal)[:150]


@functools.lru_cache(256)  # tests ask for the first ones several times
def generate(number: int) -> Program:
    """Return the program of a number, always the same."""
    drawn: list[Program] = []

    # Of several, hypothesis makes variants of one another; the first is always the simplest.
    @seed(number)
    @settings(
        max_examples=2,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(tuple(CONSTRUCTS)))
    def draw(program: Program) -> None:
        drawn.append(program)

    draw()
    return drawn[-1]


def safely(program: Program, modes: tuple[str, ...] = MODES) -> Verdict:
    """Judge a program; an error of the fuzzer itself is a failure, too.

    Callbacks of the garbage collector, which hypothesis installs, would be traced.
    """
    callbacks, gc.callbacks[:] = gc.callbacks[:], []
    try:
        return judge(program, modes)
    except Exception as error:
        text = traceback.format_exc()
        kind = f"fuzzer: {type(error).__name__}: {error}"[:100]
        return Verdict([Failure(kind, text)])
    finally:
        gc.callbacks[:] = callbacks


def fails_alike(kind: str) -> Callable[[Program], bool]:
    """Return a function that tells whether a program fails in this way."""
    modes = tuple(mode for mode in MODES if kind.startswith(f"{mode} ")) or MODES

    def fails(program: Program) -> bool:
        return any(failure.kind == kind for failure in safely(program, modes).failures)

    return fails


def campaign(numbers: Iterable[int]) -> Tally:
    """Judge the programs of these numbers; see `generate`."""
    tally = Tally()
    for number in numbers:
        program = generate(number)
        tally.add(program, safely(program))
    return tally
