"""The checks of one converted model against the original's own code."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import normswap

from .build import fixed_norms
from .outputs import TOLERANCE, Incomparable, apart, joined, leaves, loss
from .sources import Make

LABELS = (2, 0, 1)
TRAINING_LABELS = (2, 0, 1, 0)
# A label, or another sample, that moves an output by less than this share says nothing.
SENSITIVE = 1e-6


class Folded(Exception):
    """A norm whose rows are not the samples of the batch."""


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
        inputs = self.make(rows, self.dtype)
        extra: dict[str, Any] = {}
        if context is not None:
            name = getattr(type(model), "context_argument", None) or "context"
            extra[name] = context if isinstance(context, str) else torch.tensor(list(context))
        if isinstance(inputs, dict):
            return leaves(model(**inputs, **extra))
        return leaves(model(*inputs if isinstance(inputs, tuple) else (inputs,), **extra))

    @torch.no_grad()
    def run(self, model: nn.Module, rows: Sequence[int], **more: Any) -> list[Tensor]:
        """Call without gradients."""
        return self.call(model, rows, **more)

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
    try:
        if apart(singles[0], singles[1]) < SENSITIVE:
            raise Incomparable("the original outputs the same for different samples")
    except Incomparable as error:
        if "same for" in str(error):
            raise
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


def check_preserved(
    subject: Subject, model: nn.Module, expected: list[Tensor], labelled: bool, found: Findings
) -> None:
    """Compare with the original in eval: every context, mixed in one batch, and no label."""
    rows = range(len(LABELS))
    found.expect_equal("unlabelled" if labelled else "eval", subject.run(model, rows), expected)
    if not labelled:
        return
    output = subject.run(model, rows, context=LABELS)
    for row, label in enumerate(LABELS):
        found.expect_equal(f"context {label}", _row(output, row), _row(expected, row))


def _row(output: list[Tensor], row: int) -> list[Tensor]:
    size = len(LABELS)
    return [t[row : row + 1] if t.dim() and t.shape[0] == size else t for t in output]


@torch.no_grad()
def randomise(tensors: Sequence[tuple[str, Tensor]], owners: dict[int, nn.Module]) -> None:
    """Move the parameters and statistics of each context apart.

    Args:
        tensors: (name, tensor) of the layers.
        owners: id of a tensor -> its layer.
    """
    torch.manual_seed(7)
    for name, tensor in tensors:
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, nn.Parameter):
            size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
            tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.25))
            tensor.add_(0.05 * (size or 1.0) * torch.randn_like(tensor))
        elif leaf == "running_var":
            tensor.mul_(torch.empty_like(tensor).uniform_(0.7, 1.4))
        elif leaf == "running_mean":
            spread = getattr(owners[id(tensor)], "running_var", torch.ones_like(tensor)).sqrt()
            tensor.add_(0.2 * spread * torch.randn_like(tensor))


Pairs = list[tuple[nn.Module, nn.Module]]


def reference(pairs: Pairs, context: Any) -> Any:
    """Run the original's own code with each norm computed by its replacement, for one label.

    Args:
        pairs: (norm of the original, layer that replaced it).
        context: a name for all rows; a tuple with a label a row; None for layers without labels.
    """

    def compute(layer: nn.Module, x: Tensor) -> Tensor:
        if context is None:
            return layer(x)
        if isinstance(context, str):
            return layer(x, context=context)
        if x.shape[0] != len(context):
            raise Folded
        return layer(x, context=torch.tensor(context))

    return fixed_norms([(norm, partial(compute, layer)) for norm, layer in pairs])


def check_mixed(
    subject: Subject,
    model: nn.Module,
    original: nn.Module,
    pairs: Pairs,
    labelled: bool,
    dependent: str,
    found: Findings,
) -> None:
    """Compare a mixed batch with its samples one by one, through both models.

    The layers' parameters differ between contexts by now. Where the original's samples are not
    independent of each other, whole batches of one context are compared instead.
    """
    rows = range(len(LABELS))
    if dependent:
        found.doubts.append(f"mixed batches are not comparable: {dependent}")
        for label in map(str, range(len(LABELS))) if labelled and pairs else ():
            with reference(pairs, label):
                expected = subject.run(original, rows)
            found.expect_equal("one context", subject.run(model, rows, context=label), expected)
        return
    mixed = subject.run(model, rows, context=LABELS if labelled else None)

    def alone(i: int) -> list[Tensor]:
        return subject.run(model, [i], context=LABELS[i : i + 1] if labelled else None)

    def by_original(i: int) -> list[Tensor]:
        with reference(pairs, str(LABELS[i]) if labelled else None):
            return subject.run(original, [i])

    first = alone(0)
    singles = joined([first, *(alone(i) for i in rows[1:])], mixed)
    found.expect_equal("one by one", mixed, singles)
    if pairs:
        found.expect_equal("original code", mixed, subject.one_by_one(by_original, mixed))
    if labelled:
        other = subject.run(model, [0], context=[(LABELS[0] + 1) % len(LABELS)])
        found.numbers["effect"] = min(apart_or_inf(other, first), 1e9)
        if found.numbers["effect"] < SENSITIVE:
            found.problems.append("labels have no effect on the output")


def snapshot(buffers: Sequence[Tensor]) -> list[Tensor]:
    """Copy buffers."""
    return [b.clone() for b in buffers]


@torch.no_grad()
def restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put values back into buffers."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def check_training(
    subject: Subject,
    model: nn.Module,
    original: nn.Module,
    pairs: Pairs,
    parameters: list[Tensor],
    buffers: list[Tensor],
    labelled: bool,
    found: Findings,
) -> None:
    """Run one step forth and back, and compare with the original's own code doing the same."""
    rows = range(len(TRAINING_LABELS))

    def step(trained: nn.Module, context: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        output = subject.call(trained, rows, context=context)
        grads = torch.autograd.grad(loss(output), parameters, allow_unused=True)
        given = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]
        return [t.detach() for t in output], given, snapshot(buffers)

    before = snapshot(buffers)
    kept = copy.deepcopy(dict(original.named_buffers()))
    model.train()
    original.train()
    try:
        output, grads, after = step(model, TRAINING_LABELS if labelled else None)
        if not all(bool(g.isfinite().all()) for g in grads):
            found.problems.append("training: gradients are not finite")
        found.numbers["without gradient"] = sum(not bool(g.any()) for g in grads)
        if grads and found.numbers["without gradient"] == len(grads):
            found.problems.append("training: no parameter of a replaced layer got a gradient")
        found.numbers["moved"] = sum(not torch.equal(*b) for b in zip(before, after, strict=True))
        if not pairs:
            return
        restore(buffers, before)
        try:
            with reference(pairs, TRAINING_LABELS if labelled else None):
                expected = step(original, None)
        except Folded:
            found.notes.append("training compared in one context: rows are not samples")
            restore(buffers, before)
            output, grads, after = step(model, "1")
            restore(buffers, before)
            with reference(pairs, "1"):
                expected = step(original, None)
        found.expect_equal("training output", output, expected[0])
        found.expect_equal("training gradients", grads, expected[1])
        found.expect_equal("training statistics", after, expected[2])
    finally:
        model.eval()
        original.eval()
        restore(list(original.buffers()), list(kept.values()))


def check_eval_again(
    subject: Subject,
    model: nn.Module,
    original: nn.Module,
    pairs: Pairs,
    labelled: bool,
    found: Findings,
) -> None:
    """Compare one sample after training, to see that the modes were switched back."""
    label = str(LABELS[1]) if labelled else None
    with reference(pairs, label):
        expected = subject.run(original, [1])
    found.expect_equal("eval after training", subject.run(model, [1], context=label), expected)


def methods_with_layers() -> set[str]:
    """Name the methods whose layers replace norms, so that the original's code can run them."""
    return {n for n in normswap.methods() if hasattr(normswap.get_method(n), "build")}
