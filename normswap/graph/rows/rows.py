"""Which row of a norm's input belongs to which sample: measured once for each kind of call.

A model may fold windows or tokens into the batch, repeat it, or put it in another order before a
norm, and no shape tells. So the first call of a kind with mixed labels is preceded by a measurement
(see `measure`) on its first five samples, or a few more where five divide their number, and, in
brief, on one more, since an order may depend on their number. An order that is regular holds from
then on for any number of samples that those of the measurement do not divide, as long as the norms
are met in the same sequence with as many rows a sample; any other holds for the one call it was
measured for, and so does one that other lengths, masks or kinds of the samples would change.

For instance, five images of 49 windows each: a norm meets 245 rows, and the measurement finds rows
0 to 48 to be of image 0, and so on. That is a `Step`, "folded x49"; the steps of all norms in their
order are a `RowPlan`, plans for calls of one kind a `Family`; a `Run` is one call that follows one.

What this cannot tell: a batch in another dimension than the first where the sizes are equal; an
order that leaves five and six samples in place and moves those of a larger batch; an order that a
later call of the same kind changes, by a counter or by a hook of the user's, which does not run
here. What a forward changes where `snapshot` does not look, as a file, changes in a measurement,
too.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normswap.errors import ContextError
from normswap.functional.label_rows import Layer
from normswap.functional.labels import Context
from normswap.graph.rows.findings import Findings
from normswap.graph.rows.generators import started_from
from normswap.graph.rows.key import kind_of
from normswap.graph.rows.plans import DEAD, ONE, Family, RowPlan, Step
from normswap.graph.rows.quiet import find_obstacle
from normswap.graph.rows.refusals import not_aligned, refuse_cause, refuse_unknown
from normswap.graph.rows.run import ALIKE, RUN, UNMET, Run, Values

if TYPE_CHECKING:
    from normswap.graph.state import ContainerState

# Samples of a measurement: fewer leave more orders that look alike.
_FEW = 5
_MOST_DETOURS = 3
# Where random numbers choose the path: as they are, then others, until a run meets the norm.
_SEEDS = (None, *range(0x5EED1000, 0x5EED1010))
_UNREACHED = "runs that measure, in which norms are in eval mode, do not reach it"


class Rows:
    """What a converted model knows of the rows of its norms.

    Attributes:
        families: by what runs, the kinds of its arguments and the modes and flags of its modules.
        findings: by norm, for calls that no plan tells of, and for summaries.
        reason: why the last measurement that failed did.
        fixed: whether an irregular order is taken to be the same in every call of a kind.
        aligned: whether row i of every norm is declared to be of sample i, so nothing is measured.
    """

    aligned = False

    def __init__(self) -> None:
        self.families: dict[Hashable, Family] = {}
        self.findings = Findings()
        self.reason = UNMET
        self.fixed = False

    def run(
        self,
        module: nn.Module,
        state: "ContainerState",
        call: Callable[[Values, Context], Any],
        values: Values,
        context: Context,
    ) -> Any:
        """Run a container that labels entered at, its norms' rows measured before if need be."""
        outer = RUN.get()
        if self.aligned or (outer is not None and outer.model is state.scope.model):
            return call(values, context)
        run = Run(module, state.scope, call, values, context)
        kind, run.numbers = kind_of(module, values, run.samples)
        # Beside five samples six are measured, where there are as many.
        key = (state.fqn, min(run.samples, _FEW + 1), torch.is_grad_enabled(), kind)
        run.family = self.families.setdefault(key, Family())
        token = RUN.set(run)
        try:
            found = run.family.find(run.numbers, run.samples)
            run.plan = found[0] if found else self._measure(run, min(run.samples, _FEW))
            output = call(values, context)
            if run.refused is not None:
                raise run.refused
            return output
        finally:
            RUN.reset(token)

    def _measure(self, run: Run, count: int) -> RowPlan:
        """Measure the first samples of a call, or all where their order is irregular."""
        if obstacle := find_obstacle(run.module):
            self.reason = obstacle  # of this call; others may have none
            return RowPlan(reason=obstacle)
        while count < run.samples and run.samples % count == 0:
            count += 1  # a plan would not hold, see `RowPlan.holds`
        plan = run.measure(count)
        # Where each sample has as many rows as there are samples, or twice as many, an order
        # transposed again looks like none.
        while (square := plan.is_square(count)) and plan.regular and count < run.samples:
            count += 1
            plan = run.measure(count)
        alone = square or (plan.regular and self._depends_on_number(run, plan, count))
        if count < run.samples and (alone or not plan.regular):
            plan = run.measure(run.samples)
            alone = True
        plan.samples = run.samples if alone else None
        self._keep(run, plan)
        return plan

    def _depends_on_number(self, run: Run, plan: RowPlan, count: int) -> bool:
        """Return whether one sample more, or else one less, has norms meet rows in another order.

        A forward may regroup what divides by two, and leave the rest.
        """
        other = count + 1 if count < run.samples else count - 1
        if other < 2 or plan.agrees(beside := run.measure(other, brief=True)):
            return False
        self.findings.note(plan, count, self.fixed)
        self.findings.note(beside, other, self.fixed)
        return True

    def find(self, layer: Layer, site: str, x: Tensor, context: Context) -> Step | None:
        """Return how the rows of x, given to a norm, follow from the samples.

        Returns:
            None where one label holds for all rows.

        Raises:
            ContextError: labels cannot follow the rows, or nothing tells how.
        """
        if self.aligned:
            if context.whole or x.shape[0] == context.labels.shape[0]:
                return None
            raise not_aligned(site, x.shape[0], context.labels.shape[0])
        run = None if torch.compiler.is_compiling() else RUN.get()
        scope = layer.scope
        if run is not None and (run.model is scope or (scope and run.model is scope.model)):
            if run.measurement is not None:
                run.measurement.listen(layer, site, x)
                return None
            run.path.append((site, x.shape[0]))
            if run.samples == context.labels.shape[0]:
                try:
                    return run.scope.rows._follow(run, layer, site, x.shape[0])
                except ContextError as error:
                    run.refused = error
                    raise
        if context.whole or context.labels.shape[0] < 2:
            return None
        return self._recall(layer, site, x.shape[0], context)

    def _follow(self, run: Run, layer: Layer, site: str, rows: int) -> Step | None:
        """Return what the plan of a run says; measure anew where it takes another path."""
        step = run.plan.step(len(run.path) - 1, site, rows, run.samples)
        if step is None and not run.plan.reason:
            step = self._detour(run, layer, site, rows)
        if step is None:
            return self._recall(layer, site, rows, run.context, run)
        if step.cause:
            return refuse_cause(run, site, rows, step.cause)
        return step

    def _detour(self, run: Run, layer: Layer, site: str, rows: int) -> Step | None:
        """Return what is known of a norm met on another path than planned; measure that path."""
        family = run.family
        for plan in family.find(run.numbers, run.samples):
            if (step := plan.follow(run.path, run.samples)) is not None:
                run.plan = plan
                return step
        met = (site, layer.training, rows, run.samples)
        if self.findings.of(*met) is None or family.detours < _MOST_DETOURS:
            for seed in _SEEDS:
                with started_from(seed):
                    plan = run.measure(run.samples, hooks=True)
                self._keep(run, plan)
                step = plan.follow(run.path, run.samples)
                if step is not None or plan.reason:
                    run.plan = plan
                    return step
                if self.findings.of(*met) is not None:
                    break
            # Layers skipped at random: what each was given so far tells.
            family.detours += 1
        step = self.findings.of(*met)
        if step is not None and (step.regular or step.cause):
            return step
        return Step(site, False, rows, cause="rows that the same call has at some times only")

    def _keep(self, run: Run, plan: RowPlan) -> None:
        """Keep what holds for other calls."""
        self.reason = plan.reason or self.reason
        if plan.reason in (ALIKE, UNMET):
            return
        self.findings.note(plan, run.samples, self.fixed)
        if plan.reason or plan.regular:
            run.family.keep(run.numbers, plan)
        elif self.fixed and not any(step.cause or step.how == DEAD for step in plan.steps):
            plan.samples = run.samples
            run.family.keep(None, plan)

    def _recall(
        self, layer: Layer, site: str, rows: int, context: Context, run: Run | None = None
    ) -> Step | None:
        """Return what is known of a norm where no plan tells."""
        step = self.findings.recall(site, layer.training, rows, context.labels.shape[0])
        if step is not None and not step.cause:
            return step
        why = self.reason if step is None else step.cause
        if run is not None:
            # Another batch may tell.
            why = _UNREACHED if run.plan.reason == UNMET else run.plan.reason
            run.family.plans.pop(run.numbers, None)
        return refuse_unknown(context, site, rows, why)

    def forget(self) -> None:
        """Measure anew: another forward may have another order."""
        self.families.clear()
        self.findings = Findings()

    def describe(self, site: str) -> str:
        """Say for a summary where the rows of a norm come from."""
        if self.aligned:
            return f"{ONE} (declared)"
        return self.findings.describe(site) or f"not measured: {self.reason}"

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies keep: all, in dicts of their own."""
        return {k: dict(v) if isinstance(v, dict) else v for k, v in self.__dict__.items()}
