"""Run a program's actions on references and converted models side by side; say who was right."""

import contextlib
import traceback
from typing import Any

import torch

import normswap
from normswap.errors import NormswapError
from tests.graph.fuzz.compare import (
    compare_effects,
    compare_outputs,
    compare_statistics,
    compare_training,
    views_equal,
)
from tests.graph.fuzz.observe import Stray
from tests.graph.fuzz.program import Call, Change, Copy, Original, Program, Threads
from tests.graph.fuzz.sides import NAMES, Converted, Pooled, Reference
from tests.graph.fuzz.tensors import images
from tests.graph.fuzz.threads import call_at_once
from tests.graph.fuzz.verdict import WAYS_OUT, Verdict, make_failure
from tests.graph.fuzz.world import Outcome

# What programs raise on purpose.
_OWN = ("too large", "channels")


class _Wrong(Exception):
    """One way to convert the program fails; the others go on."""


class _Invalid(Exception):
    pass


class Trial:
    """One program under way: references for each label, and models converted in each way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.worlds: list[Any] = []
        self.references = [self._add(Reference(program, k)) for k in range(len(NAMES))]
        self.pooled: Pooled | None = None
        self.verdict = Verdict()
        self.stage = "conversion"
        self.last: set[Any] = set()
        if program.unknown == "pooled" and any(
            isinstance(a, Call) and (None in a.labels or not a.labels) for a in program.actions
        ):
            self.pooled = self._add(Pooled(program, self.references))
        self.converted: dict[str, Converted] = {}

    def _add(self, world):
        self.worlds.append(world)
        return world

    def close(self) -> None:
        for world in self.worlds:
            world.close()

    def start(self, modes: tuple[str, ...]) -> None:
        """Convert, in these ways."""
        if not self.references[0].norms():
            raise _Invalid("it has no norm")
        idle = self.references[0].run(lambda: None).random
        for mode in modes:
            with self.judging(mode):
                world = self._add(Converted(self.program, mode == "traced", self.references))
                if world.outcome.error is not None:
                    self.fails_itself(world.outcome.error)
                    self.refused(mode, world.outcome.error)
                else:
                    self.converted[mode] = world
                if difference := views_equal(world.before, world.see_original()):
                    raise _Wrong(f"the original was changed: {difference}")
                if world.outcome.lines and not self.program.verify:
                    raise _Wrong(f"printed {world.outcome.lines!r}")
                if world.outcome.random != idle:
                    raise _Wrong("random generators elsewhere")

    def fails_itself(self, error: Exception) -> None:
        """Look whether the original fails just so on the inputs it is verified with."""
        other = Reference(self.program, 0)
        got = other.run(lambda: other.model.eval()(images(2, 6))).error
        other.close()
        same = (type(got), str(got)) in {(type(e), str(e)) for e in (error, error.__cause__)}
        if self.program.verify and same:
            raise _Invalid(str(got))

    @contextlib.contextmanager
    def judging(self, mode: str):
        """Note what goes wrong inside the block; this way to convert then takes no further part."""
        try:
            yield
        except (_Wrong, Stray) as wrong:
            self.converted.pop(mode, None)
            detail = f"stray: {wrong}" if isinstance(wrong, Stray) else str(wrong)
            self.verdict.failures.append(make_failure(mode, self.stage, detail))

    def each(self):
        """Yield each way to convert that is still right, and its model."""
        yield from list(self.converted.items())

    def refused(self, mode: str, error: Exception) -> None:
        """Take an error of ours for a refusal if it is one on purpose that names a way out."""
        self.converted.pop(mode, None)
        if isinstance(error, NormswapError):
            if not WAYS_OUT.search(str(error)):
                raise _Wrong(f"names no way out: {error}")
            self.verdict.refusals.append(f"{mode}, {self.stage}: {error}")
            return
        text = "".join(traceback.format_exception(error))
        raise _Wrong(f"raw {type(error).__name__}: {error}\n{text}")

    def sources(self, action: Call) -> list[Any]:
        """Return for each sample which reference it follows; None where none tells."""
        labels: Any = action.labels or (None,)
        if len(labels) == 1:
            labels = labels * action.batch
        unknown: Any = 1 if self.program.unknown == "b" else None
        if self.pooled is not None:
            unknown = "pooled"
        return [unknown if k is None else k for k in labels]

    def act(self, action: Any) -> None:
        self.stage = type(action).__name__.lower()
        if isinstance(action, Call):
            self.stage = "train" if action.train else "eval"
            self.call(action)
        elif isinstance(action, Change):
            self.everywhere(lambda world: world.change(action))
            if self.pooled is not None:
                self.pooled.pool()
        elif isinstance(action, Copy):
            self.stage = action.how
            try:
                self.everywhere(lambda world: world.copy(action.how))
            except _Invalid:
                if action.how != "pickle":
                    raise
        elif isinstance(action, Original):
            x = images(2, 6)
            self.everywhere(
                lambda w: w.evaluate(action.expression, x.clone(), {}, w.original.eval())
            )
        elif isinstance(action, Threads):
            self.threads(action)

    def everywhere(self, run: Any) -> None:
        """Do the same in every world."""
        references = [*filter(None, [self.pooled]), *self.references]
        outcomes = [world.run(lambda world=world: run(world)) for world in references]
        expected = outcomes[-1]
        # What a branch on values did before depends on the label.
        alike = not any(compare_effects(other, expected, False) for other in outcomes)
        if expected.error is not None:
            raise _Invalid(str(expected.error))
        told = self.stage == "original" and not any(
            compare_outputs(other, {0: expected}, [0, 0], True) for other in outcomes
        )
        for mode, world in self.each():
            with self.judging(mode):
                got = world.run(lambda world=world: run(world))
                if got.error is not None:
                    self.refused(mode, got.error)
                    continue
                difference = compare_effects(got, expected, False) if alike else ""
                if not difference and told:
                    difference = compare_outputs(got, {0: expected}, [0, 0], True)
                if difference:
                    raise _Wrong(difference)

    def call(self, action: Call) -> None:
        sources = self.sources(action)
        expected = self.expect(action, sources)
        known = {s for s in sources if s is not None}
        self.last |= known if len(known) == 1 and None not in sources else {"mixed", "many"}
        exact = len(self.last) == 1
        main = expected[next(iter(known), 0)]
        own = str(main.error) in _OWN
        failed = [expected[s].error for s in known if expected[s].error is not None]
        if failed and main.error is None:  # the original fails with one label, not with another
            raise _Invalid(str(failed[0]))
        for mode, world in self.each():
            with self.judging(mode):
                before = {k: v.clone() for k, v in world.model.state_dict().items()}
                got = world.run(lambda world=world: world.call(action))
                if own:
                    self.same_error(main.error, got)
                if main.error is not None:
                    continue
                if got.error is not None:
                    self.refused(mode, got.error)
                    if not action.train:
                        self.untouched(world, before)
                    continue
                difference = compare_outputs(got, expected, sources, exact) or compare_effects(
                    got, main, exact
                )
                if not difference and action.train:
                    difference = compare_training(world, self.references[sources[0]], sources[0])
                difference = difference or compare_statistics(world, self.references)
                if difference:
                    raise _Wrong(difference)
        if main.error is not None and not own:
            raise _Invalid(str(main.error))

    def expect(self, action: Call, sources: list[Any]) -> dict[Any, Outcome]:
        """Call the references; those whose label is not there keep their statistics."""
        by_source: dict[Any, Reference] = dict(enumerate(self.references))
        if self.pooled is not None:
            by_source["pooled"] = self.pooled
        expected: dict[Any, Outcome] = {}
        for source, world in by_source.items():
            kept = [{k: v.clone() for k, v in n.state_dict().items()} for n in world.norms()]
            expected[source] = world.run(lambda world=world: world.call(action))
            if source not in sources:
                for norm, state in zip(world.norms(), kept, strict=True):
                    norm.load_state_dict(state)
        if self.pooled is not None:
            self.pooled.pool()
        return expected

    def untouched(self, world: Converted, before: dict[str, torch.Tensor]) -> None:
        """Check that a refusal in eval left the norms as they were."""
        after = world.model.state_dict()
        names = [name for name in before if "running" in name or "tracked" in name]
        if not all(torch.equal(after[name], before[name]) for name in names):
            raise _Wrong("a refusal that changed statistics")

    def same_error(self, expected: Exception, got: Outcome) -> None:
        """Compare errors of the program's own making."""
        if (type(got.error), str(got.error)) != (type(expected), str(expected)):
            raise _Wrong(f"expected {expected!r}, got {got.error!r}")

    def threads(self, action: Threads) -> None:
        """Call from two threads at once; each finds its own labels."""
        call = Call(action.expression)
        expected = [r.run(lambda r=r: r.call(call)) for r in self.references]
        if any(e.error for e in expected):
            raise _Invalid("threads")
        if self.pooled is not None:
            self.pooled.run(lambda: self.pooled.call(call))
        for mode, world in self.each():
            with self.judging(mode):
                results: dict[int, Any] = {}
                world.run(lambda world=world, results=results: call_at_once(world, call, results))
                for k, result in sorted(results.items()):
                    if isinstance(result, Exception):
                        self.refused(mode, result)
                        break
                    got = world.run(lambda result=result: result)
                    sources = [k] * call.batch
                    if difference := compare_outputs(got, {k: expected[k]}, sources, True):
                        raise _Wrong(difference)

    def count(self) -> None:
        """Count the containers of the traced model."""
        self.stage = "summary"
        for mode, world in self.each():
            with self.judging(mode):
                try:
                    report = normswap.summary(world.model)
                except Exception as error:
                    self.refused(mode, error)
                    continue
                if mode == "traced":
                    self.verdict.traced, self.verdict.scoped = report.traced, dict(report.opaque)


MODES = ("untraced", "traced")


def judge(program: Program, modes: tuple[str, ...] = MODES) -> Verdict:
    """Return what became of a program, converted in these ways."""
    trial = Trial(program)
    try:
        trial.start(modes)
        for action in program.actions:
            trial.act(action)
        trial.count()
    except _Invalid as invalid:
        trial.verdict.invalid = str(invalid)
    finally:
        trial.close()
    return trial.verdict
