"""A model under test, how it is run, and what running it showed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .outputs import TOLERANCE, Incomparable, apart, joined, leaves
from .sources import Make

LABELS = (2, 0, 1)
TRAINING_LABELS = (2, 0, 1, 0)
# A label, or another sample, that moves an output by less than this share says nothing.
SENSITIVE = 1e-6


@dataclass
class Findings:
    """What the checks found.

    Attributes:
        numbers: name of a check -> largest relative difference.
        problems: what is wrong.
        doubts: what could not be checked, and why.
        notes: what is worth knowing.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def expect_equal(self, name: str, new: list[Tensor], old: list[Tensor]) -> None:
        """Compare two outputs and keep the difference; beyond rounding it is a problem."""
        dtype = next((t.dtype for t in old if t.is_floating_point()), torch.float64)
        try:
            difference = min(apart(new, old), 1e9)
        except Incomparable as error:
            self.problems.append(f"{name}: {error}")
            return
        self.numbers[name] = max(self.numbers.get(name, 0.0), difference)
        if not difference <= TOLERANCE.get(dtype, 1e-3):
            self.problems.append(f"{name}: outputs differ by {difference:.1e}")


@dataclass
class Subject:
    """A model under test and how to run it: every run starts from a given random state."""

    make: Make
    dtype: torch.dtype
    seed: int = 0

    def call(
        self, model: nn.Module, rows: Sequence[int], context: Any = None, seed: int = 0
    ) -> list[Tensor]:
        """Run a model on the numbered samples and give the tensors it outputs."""
        torch.manual_seed(self.seed + seed)
        random.seed(self.seed + seed)
        numpy.random.seed(self.seed + seed)
        inputs = self.make(rows, self.dtype)
        extra: dict[str, Any] = {}
        if context is not None:
            name = getattr(type(model), "_normswap_argument", None) or "context"
            extra[name] = context if isinstance(context, str) else torch.tensor(list(context))
        if isinstance(inputs, dict):
            return leaves(model(**inputs, **extra))
        return leaves(model(*inputs if isinstance(inputs, tuple) else (inputs,), **extra))

    @torch.no_grad()
    def run(self, model: nn.Module, rows: Sequence[int], **more: Any) -> list[Tensor]:
        """Call without gradients."""
        return self.call(model, rows, **more)

    def rounding(self, model: nn.Module) -> float:
        """Return how far the output moves, relatively, when the inputs move by 16 roundings."""
        factor = 1 + 16 * torch.finfo(self.dtype).eps

        def scale(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value * factor if is_float else value

        moved = Subject(lambda *a: tree_map(scale, self.make(*a)), self.dtype, self.seed)
        rows = range(len(LABELS))
        return apart_or_inf(moved.run(model, rows), self.run(model, rows))

    def one_by_one(self, run: Callable[[int], list[Tensor]], whole: list[Tensor]) -> list[Tensor]:
        """Run each sample of the batch by itself and put the outputs in the batch's layout."""
        return joined([run(i) for i in range(len(LABELS))], whole)


def examine_original(subject: Subject, model: nn.Module) -> tuple[list[Tensor], str]:
    """Give the original's outputs, and why its samples cannot be compared one by one, if so.

    Raises:
        Incomparable: outputs of an unknown kind, not finite, or the same whatever goes in.
    """
    rows = range(len(LABELS))
    whole = subject.run(model, rows)
    if not any(t.is_floating_point() and t.numel() for t in whole):
        raise Incomparable("outputs no floating-point values")
    if not all(bool(t.isfinite().all()) for t in whole):
        raise Incomparable("the original's own output is not finite")
    singles = [subject.run(model, [i], seed=1 + i) for i in rows]
    first, second = row_of(whole, 0), row_of(whole, 1)
    in_rows = any(part is not t for part, t in zip(first, whole, strict=True))
    if in_rows and apart_or_inf(second, first) < SENSITIVE:
        raise Incomparable("the original outputs the same for different samples")
    try:
        if apart(joined(singles, whole), whole) <= TOLERANCE.get(subject.dtype, 1e-3):
            return whole, ""
        reason = "the original's output for a sample depends on the rest of the batch"
    except Incomparable as error:
        reason = f"the original's samples cannot be told apart in its output ({error})"
    if apart_or_inf(subject.run(model, rows, seed=9), whole) > 0:
        reason = "the original's output in eval is random"
    return whole, reason


def apart_or_inf(new: list[Tensor], old: list[Tensor]) -> float:
    """Give the difference, infinite where shapes differ."""
    try:
        return apart(new, old)
    except Incomparable:
        return float("inf")


def row_of(output: list[Tensor], row: int) -> list[Tensor]:
    """Give a sample's part of each tensor that has one row a sample; others stay whole."""
    size = len(LABELS)
    return [t[row : row + 1] if t.dim() and t.shape[0] == size else t for t in output]
