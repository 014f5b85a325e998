"""The checks of one converted model against the original's own code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Folded, Pairs, reference, restore, snapshot
from .outputs import joined, loss
from .subject import LABELS, SENSITIVE, TRAINING_LABELS, Findings, Subject, apart_or_inf, row_of


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
        found.expect_equal(f"context {label}", row_of(output, row), row_of(expected, row))


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


def check_reverted(
    subject: Subject, reverted: nn.Module, original: nn.Module, expected: Any, found: Findings
) -> None:
    """Compare a reverted model with the original: class, state to the bit, and outputs."""
    if type(reverted) is not type(original):
        found.problems.append(f"reverted: a {type(reverted)}, not a {type(original)}")
    states = original.state_dict(), reverted.state_dict()
    if list(states[0]) != list(states[1]):
        found.problems.append("reverted: other keys of the state dict")
    elif not all(map(torch.equal, *(_tensors(s) for s in states))):
        found.problems.append("reverted: other values in the state dict")
    found.expect_equal("reverted", subject.run(reverted, range(len(LABELS))), expected)


def check_one_reverted(
    subject: Subject, reverted: nn.Module, original: nn.Module, pairs: Pairs, found: Findings
) -> None:
    """Compare a model reverted to context 1, after contexts moved apart, with that context."""
    rows = range(len(LABELS))
    with reference(pairs, "1"):
        expected = subject.run(original, rows)
    found.expect_equal("reverted to one context", subject.run(reverted, rows), expected)


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


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
    moved = {id(b) for b in buffers}
    kept = [(m, copy.deepcopy(dict(m.named_buffers()))) for m in (original, model)]
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
        # All but those of layers, which stay moved: a flow's own norms, for example.
        for owner, values in kept:
            others = [n for n, b in owner.named_buffers() if id(b) not in moved]
            restore([owner.get_buffer(n) for n in others], [values[n] for n in others])


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
