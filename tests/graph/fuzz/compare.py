"""Whether what a converted model did is what the references did, each sample by its label."""

from typing import Any

import torch
from torch import Tensor

from tests.graph.fuzz.sides import PRIORS, Converted, Reference
from tests.graph.fuzz.world import Outcome

TOLERANCE = 1e-7


def close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.numel():
        return True
    scale = max(1.0, float(expected.double().abs().nan_to_num(posinf=0).max()))
    tolerance = TOLERANCE if expected.dtype == torch.float64 else 1e-4
    return torch.allclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def loose(structure: Any) -> Any:
    """Return a structure without the values of floats."""
    if isinstance(structure, tuple) and structure[:1] == ("float",):
        return "float"
    if isinstance(structure, dict):
        return {k: loose(v) for k, v in structure.items()}
    if isinstance(structure, (tuple, list)):
        return [loose(v) for v in structure]
    return structure


def first_difference(one: Any, other: Any, where: str = "") -> str:
    """Return where two structures differ first, and how; "" where they do not."""
    if type(one) is not type(other):
        return f"{where}: expected {one!r}, got {other!r}"
    if isinstance(one, dict):
        if list(one) != list(other):
            lacks, more = [k for k in one if k not in other], [k for k in other if k not in one]
            return f"{where}: lacks {lacks}, has {more} more, or another order"
        found = (first_difference(one[k], other[k], f"{where}.{k}") for k in one)
        return next((f for f in found if f), "")
    if isinstance(one, (tuple, list)):
        if len(one) != len(other):
            return f"{where}: expected {one!r}, got {other!r}"
        pairs = enumerate(zip(one, other, strict=True))
        found = (first_difference(a, b, f"{where}[{k}]") for k, (a, b) in pairs)
        return next((f for f in found if f), "")
    return "" if one == other else f"{where}: expected {one!r}, got {other!r}"


def compare_outputs(
    got: Outcome, expected: dict[Any, Outcome], sources: list[Any], exact: bool
) -> str:
    """Compare results: of one reference where all samples have one source, else row by row.

    Args:
        got: of the converted model.
        expected: of the references, by source.
        sources: for each sample the reference it follows; None where nothing tells what it gets.
        exact: whether values kept from earlier calls are the reference's too.
    """
    known = [s for s in sources if s is not None]
    first = expected[known[0]] if known else next(iter(expected.values()))
    whole = len(known) == len(sources) and len(set(known)) == 1
    strip = (lambda s: s) if whole and exact else loose
    if difference := first_difference(strip(first.result), strip(got.result)):
        return f"another result {difference}"
    followed = {s: expected[s] for s in known}  # the others may have raised
    for index, (tensor, *refs) in enumerate(
        zip(got.tensors, *(e.tensors for e in followed.values()), strict=True)
    ):
        by_source = dict(zip(followed, refs, strict=True))
        rows = tensor.dim() and tensor.shape[0] == len(sources)
        if whole:
            right = close(tensor, by_source[sources[0]])
        elif rows:
            right = all(
                close(tensor[n], by_source[s][n]) for n, s in enumerate(sources) if s is not None
            )
        else:
            right = True
        if not right:
            return f"another value in tensor {index} of the result"
    return ""


def compare_effects(got: Outcome, expected: Outcome, exact: bool) -> str:
    """Compare everything a call left behind; values only if `exact`."""
    if got.lines != expected.lines:
        return f"other lines printed: expected {expected.lines!r}, got {got.lines!r}"
    strip = (lambda s: s) if exact else loose
    if difference := first_difference(strip(expected.state), strip(got.state)):
        return f"other state {difference}"
    for tensor, wanted in zip(got.state_tensors, expected.state_tensors, strict=True):
        if tensor.dtype != wanted.dtype:
            return "another dtype in the state"
        if (exact or not wanted.is_floating_point()) and not close(tensor, wanted):
            return "another value in a tensor of the state"
    if got.random != expected.random:
        return "random generators elsewhere"
    return ""


def compare_training(model: Converted, reference: Reference, k: int) -> str:
    """Compare gradients and statistics after training with one label."""
    norms = list(zip(model.norms(), reference.norms(), strict=True))
    inside = {id(p) for pair in norms for m in pair for p in m.parameters()}
    gradients = [
        [(name, p.grad) for name, p in m.named_parameters() if id(p) not in inside]
        for m in (model.model, reference.model)
    ]
    for (name, got), (_, expected) in zip(*gradients, strict=True):
        if difference := _gradient(got, expected):
            return f"gradient of {name}: {difference}"
    for layer, norm in norms:
        for name in ("weight", "bias"):
            grad = getattr(layer, name).grad
            row = None if grad is None else grad[k] * PRIORS[k] ** 0.5
            if difference := _gradient(row, getattr(norm, name).grad):
                return f"gradient of a norm's {name}: {difference}"
            if grad is not None and float(grad[1 - k].abs().max()) > 0:
                return f"gradient of a norm's {name} for a label that is not there"
    return ""


def compare_statistics(model: Converted, references: list[Reference]) -> str:
    """Compare running statistics of every context."""
    for k, reference in enumerate(references):
        for layer, norm in zip(model.norms(), reference.norms(), strict=True):
            for name in ("running_mean", "running_var"):
                if not close(getattr(layer, name)[k], getattr(norm, name)):
                    return f"another {name} of context {k}"
    return ""


def _gradient(got: Tensor | None, expected: Tensor | None) -> str:
    if expected is None:
        none = got is None or not float(got.abs().max())
        return "" if none else "there is one, where the original has none"
    if got is None:
        return "" if not float(expected.abs().max()) else "there is none"
    return "" if close(got, expected) else "another value"


def views_equal(one: tuple[Any, list[Tensor]], other: tuple[Any, list[Tensor]]) -> str:
    """Compare what was seen of a model and its module at two times."""
    if difference := first_difference(one[0], other[0]):
        return difference
    same = all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return "" if same else "another value in a tensor"
