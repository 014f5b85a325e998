"""One call of a model, from where the labels entered it, and measurements for it."""

import threading
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks

from normswap.errors import ContextError
from normswap.functional.labels import Context
from normswap.graph.rows.measure import Measurement
from normswap.graph.rows.plans import RAISES, Family, RowPlan
from normswap.graph.rows.quiet import after_hooks, has_onlookers, quiet
from normswap.graph.rows.samples import batches_in, fresh, vary

if TYPE_CHECKING:
    from normswap.graph.scope.scope import Scope

# The arguments of a forward, one for each of its parameters.
Values: TypeAlias = tuple[object, ...]

_LOCK = threading.RLock()
# Of a call that says nothing of any other.
ALIKE = "its samples are all alike"
UNMET = "no batch of several contexts has reached it"


@dataclass
class Run:
    """A call of a container, the plan it follows, and the norms it has met with their rows.

    Attributes:
        refused: what a norm raised whose rows labels cannot follow; the forward may catch it.
        samples: how many there are.
        model: the scope of the whole model.
    """

    module: nn.Module
    scope: "Scope"
    call: Callable[[Values, Context], Any]
    values: Values
    context: Context
    family: Family = field(default_factory=Family)
    numbers: Hashable = None
    plan: RowPlan = field(default_factory=RowPlan)
    path: list[tuple[str, int]] = field(default_factory=list)
    measurement: Measurement | None = None
    refused: ContextError | None = None

    def __post_init__(self) -> None:
        # Every norm asks.
        self.samples, self.model = self.context.labels.shape[0], self.scope.model

    def measure(self, count: int, hooks: bool = False, brief: bool = False) -> RowPlan:
        """Measure on the first samples of this call; hooks of the user's run only if asked.

        Brief: what may change the order is not tried.
        """
        # A list of two images or of two inputs, of two samples: as inputs, images tell nothing.
        try:
            found = [batches_in(self.values, self.samples, several)[0] for several in (True, False)]
        except Exception as error:
            return RowPlan(reason=_because("an argument cannot be copied", error))
        counts = set(map(len, found))
        several = len(counts) > 1
        plan = self._measure(count, hooks, brief, several)
        if several and (plan.reason or any(step.cause for step in plan.steps)):
            plan = self._measure(count, hooks, brief, several := False)
        # A forward may go on with what a hook keeps, as a U-Net of fastai does.
        if plan.fails and not hooks and has_onlookers(self.module):
            hooked = self._measure(count, True, brief, several)
            plan = hooked if hooked.told else plan
        if plan.steps and plan.fails:
            rescaled = self._measure(count, hooks, brief, several, rescale=True)
            plan = rescaled if rescaled.explains(plan) else plan
        return plan

    def _measure(
        self,
        count: int,
        hooks: bool,
        brief: bool,
        batches: bool,
        rescale: bool = False,
        around: bool = True,
    ) -> RowPlan:
        """Measure once, through the container's own pre-hooks; they ran before labels entered.

        They are run on what they made, and left out where the model then raises.
        """
        around = around and bool(self.module._forward_pre_hooks or _global_forward_pre_hooks)
        # One label for all, whichever: rows that nothing is known of can take it.
        whole = Context(self.context.labels[:1].clamp(min=0), False, True)
        try:
            values = vary(self.values, self.samples, lambda batch: fresh(batch[:count]), batches)
            # Checkpointing around this call would count what is saved for backward.
            unhooked = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)
            with _LOCK, unhooked, quiet(self.module, hooks, rescale) as (before, modes):
                enter = partial(after_hooks, self.module) if around else tuple
                found = Measurement(
                    lambda v: self.call(enter(v), whole),
                    before.restore,
                    values,
                    count,
                    modes,
                    batches,
                )
                if not found.possible:
                    # As where a method of the user's repeats samples, or slices them, before it.
                    given = (
                        f"no argument of {type(self.module).__name__} has {self.samples} samples"
                    )
                    return RowPlan(
                        reason=f"{given}: enter use_context with a label for each it has"
                    )
                self.measurement = found
                if not rescale and (steps := found.follow()):
                    return RowPlan(steps)
                steps = found.steps(brief)
                if not found.varied:
                    return RowPlan(reason=ALIKE if steps else UNMET)
                return RowPlan(steps, measured=count)
        except Exception as error:
            if around:
                return self._measure(count, hooks, brief, batches, rescale, around=False)
            # The model's own code, given samples that it may not be made for.
            return RowPlan(reason=_because(RAISES, error))
        finally:
            self.measurement = None


def _because(what: str, error: Exception) -> str:
    why = f"{type(error).__name__}: {error}".split("\n")[0]
    return f"{what}, {why:.120}"


RUN: ContextVar[Run | None] = ContextVar("normswap_run", default=None)


def is_measuring() -> bool:
    """Return whether this code runs on the side, to be forgotten."""
    run = RUN.get()
    return run is not None and run.measurement is not None
