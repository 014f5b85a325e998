"""Compare a converted model with the original: same function, for every context."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.conversion.inputs import Inputs, guess_inputs
from normswap.errors import ConversionError, NormswapError, VerificationError
from normswap.functional.moments import widen
from normswap.graph.questions.bypassed import find_bypassed, leave_out
from normswap.graph.rows.snapshot import Snapshot
from normswap.report import Verification
from normswap.util.batches import undisturbed

# Output differences allowed, as a share of the largest output; rounding is far below, a wrong
# statistic or affine far above.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True)
class Reference:
    """What the original outputs, in eval mode, for inputs that it runs on."""

    inputs: Inputs
    outputs: list[Tensor]


def run_original(model: nn.Module, given: Inputs | None, labels: int) -> Reference | Verification:
    """Run the original on what the user gave, else on a guess; else say why nothing is compared.

    `labels` is how many contexts are to be compared; 0 for a method without.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return Verification(reason="the model has no values (meta device)")

    def refer(given: Inputs) -> Reference:
        inputs = given.widen(labels)
        return Reference(inputs, eval_outputs(model, inputs))

    if given is not None:
        try:
            return refer(given)
        except Exception as error:
            raise ConversionError(
                f"the original model itself fails on example_inputs ({_brief(error)}); expected "
                "what its forward takes in eval mode, batch first"
            ) from error
    reason = "pass example_inputs= to compare outputs"
    for guess in guess_inputs(model):
        try:
            return refer(guess)
        except Exception as error:
            reason = (
                f"the model did not run on a guessed input {tuple(guess.args[0].shape)} "
                f"({_brief(error)}); pass example_inputs="
            )
    return Verification(reason=reason)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def eval_outputs(model: nn.Module, inputs: Inputs, **extra: Any) -> list[Tensor]:
    """Return the tensors a model outputs in eval mode, its modes and torch's generator kept."""
    inputs, before = inputs.copy(), Snapshot(model)
    try:
        with undisturbed(model, seed=0), torch.no_grad():
            output = model(*inputs.args, **inputs.kwargs, **extra)
        # Copies: what a model returns may be a buffer, which is put back.
        return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    finally:
        before.restore()


def compare(
    model: nn.Module,
    reference: Reference,
    names: tuple[str, ...],
    argument: str | None,
    allow_unknown: bool,
    keeps: bool = True,
) -> Verification:
    """Compare outputs for every context, mixed in one batch, and for unknown labels.

    `argument` names the model's context argument, None where it takes none. A difference beyond
    rounding is an error if the method `keeps` the function.
    """
    inputs, expected = reference.inputs, reference.outputs
    result, batch = Verification(keeps=keeps), inputs.batch
    try:
        if argument is None or allow_unknown:
            name = "eval" if argument is None else "unknown"
            _record(result, name, _run(model, inputs), expected)
        step = batch or 1
        for start in range(0, 0 if argument is None else len(names), step):
            chosen = list(range(start, min(start + step, len(names))))
            each = [chosen[i % len(chosen)] for i in range(batch)]
            # Of a batch that no tensor tells, as a graph's, all have one label.
            labels = torch.tensor(each, device=inputs.device) if batch else chosen[0]
            outputs = _run(model, inputs, **{str(argument): labels})
            for label in chosen:
                rows = labels == label if isinstance(labels, Tensor) else None
                _record(result, names[label], outputs, expected, rows)
    except VerificationError as error:
        found = find_bypassed(model)
        if not found:
            raise
        why = f"its forwards take {', '.join(found)} past the norm; {leave_out(found)}"
        raise VerificationError(f"{error}; {why}") from error
    if not result.reason and result.scale == 0:
        result.reason = "every output is zero"
    return result


def _run(model: nn.Module, inputs: Inputs, **extra: Any) -> list[Tensor]:
    try:
        return eval_outputs(model, inputs, **extra)
    except NormswapError:
        raise
    except Exception as error:
        raise VerificationError(
            f"the converted model fails where the original runs ({_brief(error)}); the model is "
            "unchanged"
        ) from error


def _record(
    result: Verification, name: str, after: list[Tensor], before: list[Tensor], rows: Any = None
) -> None:
    """Note the largest difference; of these rows only, where an output has one a sample."""
    if [(t.shape, t.dtype) for t in after] != [(t.shape, t.dtype) for t in before]:
        raise VerificationError(
            f"the converted model's outputs have other shapes or dtypes ({name}): expected "
            f"{_shapes(before)}, got {_shapes(after)}"
        )
    compared = False
    for new, old in zip(after, before, strict=True):
        if not (old.is_floating_point() or old.is_complex()):
            continue
        tolerance = TOLERANCE.get(old.dtype, 5e-2)
        new, old = _as_wide(new), _as_wide(old)
        scale = float(old[old.isfinite()].abs().max()) if old.isfinite().any() else 0.0
        if rows is not None and old.dim() and old.shape[0] == rows.shape[0]:
            new, old = new[rows.to(new.device)], old[rows.to(old.device)]
        finite = old.isfinite()
        # Infinities of one sign are equal, which their difference would not show.
        alike = (new == old) | (new.isnan() & old.isnan()) | (not result.keeps)
        same = torch.where(finite, new.isfinite(), alike)
        difference = float((new - old)[finite].abs().nan_to_num().max()) if finite.any() else 0.0
        if not same.all() or (result.keeps and difference > scale * tolerance):
            lost, odd = int((finite & ~same).sum()), int((~finite & ~same).sum())
            beside = f", and {lost} that were finite are not" if lost else ""
            beside += f", and {odd} that were not finite are something else" if odd else ""
            raise VerificationError(
                f"the converted model computes another function for context {name}: outputs up to "
                f"{scale:.3g} differ by {difference:.3g}{beside}; the model is unchanged"
            )
        if finite.any():
            compared = True
            result.scale = max(result.scale, scale)
            result.differences[name] = max(result.differences.get(name, 0.0), difference)
    if not compared and not result.reason:
        result.reason = f"nothing finite was compared (context {name})"


def _as_wide(t: Tensor) -> Tensor:
    """Return real numbers, strided, so wide that comparing adds no rounding."""
    t = t.to_dense() if t.layout != torch.strided else t
    return widen(torch.view_as_real(t) if t.is_complex() else t)


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in tensors) or "no tensor"
