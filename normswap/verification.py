"""Compare a converted model with the original: same function, for every context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import ConversionError, VerificationError
from normswap.report import Verification
from normswap.streams import modes_kept
from normswap.util.restore_state import remember

# Output differences allowed, as a share of the largest output; rounding is far below, a wrong
# statistic or affine far above.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_MOST_CONTEXTS_A_BATCH = 8


def make_inputs(model: nn.Module) -> tuple[Any, ...] | str:
    """Return example inputs for a model that states its input size (timm), else why not."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.is_meta:
        return "the model has no values" if parameter is not None else "it has no parameters"
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is None:
        return "pass example_inputs= to compare outputs"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *size, generator=generator)
    return (images.to(device=parameter.device, dtype=parameter.dtype),)


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a forward from a tensor, tuple or dict."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with modes_kept(model):
        undo = remember(model)
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(enabled=True, devices=[]):
                torch.manual_seed(0)
                yield
        finally:
            undo()


def eval_outputs(model: nn.Module, inputs: Any, **extra: Any) -> list[Tensor]:
    """Return the tensors a model outputs in eval mode, its modes and torch's generator kept."""
    args, kwargs = split_inputs(inputs)
    with _evaluating(model):
        return [
            leaf
            for leaf in tree_leaves(model(*args, **kwargs, **extra))
            if isinstance(leaf, Tensor)
        ]


def compare(
    model: nn.Module,
    reference: Callable[[Any], list[Tensor]],
    inputs: Any,
    names: tuple[str, ...],
    argument: str | None,
    allow_unknown: bool,
) -> Verification:
    """Compare outputs for every context, mixed in one batch, and for unknown labels.

    Args:
        model: the converted model.
        reference: returns the original's outputs for inputs.
        inputs: example inputs, batch first.
        names: of the contexts.
        argument: name of the model's context argument; None where it takes none.
        allow_unknown: whether to compare without labels.

    Raises:
        ConversionError: inputs without a batch.
        VerificationError: a difference beyond rounding.
    """
    result = Verification()
    if argument is None:
        _record(result, "eval", eval_outputs(model, inputs), reference(inputs))
        return result
    if allow_unknown:
        _record(result, "unknown", eval_outputs(model, inputs), reference(inputs))
    batch = next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 0)
    if batch == 0:
        raise ConversionError("expected example_inputs with a batch dimension, got none")
    for start in range(0, len(names), batch):
        chosen = list(range(start, min(start + batch, len(names))))
        labels = torch.tensor([chosen[i % len(chosen)] for i in range(batch)])
        device = next(t.device for t in tree_leaves(inputs) if isinstance(t, Tensor))
        outputs = eval_outputs(model, inputs, **{argument: labels.to(device)})
        expected = reference(inputs)
        for label in chosen:
            rows = labels == label
            _record(result, names[label], outputs, expected, rows)
    return result


def widen(inputs: Any, num_contexts: int) -> Any:
    """Repeat a batch so that more contexts fit in one forward."""
    sizes = {t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        return inputs
    wanted = min(max(num_contexts, 1), _MOST_CONTEXTS_A_BATCH)
    times = -(-wanted // max(sizes.pop(), 1))
    return tree_map(
        lambda t: torch.cat([t] * times) if isinstance(t, Tensor) and t.dim() else t, inputs
    )


def _record(
    result: Verification,
    name: str,
    after: list[Tensor],
    before: list[Tensor],
    rows: Tensor | None = None,
) -> None:
    """Note the largest difference; of these rows only, where an output has one a sample."""
    if [t.shape for t in after] != [t.shape for t in before]:
        raise VerificationError(
            f"the converted model's outputs have other shapes ({name}): expected "
            f"{[tuple(t.shape) for t in before]}, got {[tuple(t.shape) for t in after]}"
        )
    for new, old in zip(after, before, strict=True):
        if not old.numel() or not old.is_floating_point():
            continue
        scale = float(old.double().abs().nan_to_num(posinf=0.0).max())
        apart = (new.double() - old.double()).abs().nan_to_num()
        if rows is not None and old.dim() and old.shape[0] == rows.shape[0]:
            apart = apart[rows.to(apart.device)]
        difference = float(apart.max())
        result.scale = max(result.scale, scale)
        result.differences[name] = max(result.differences.get(name, 0.0), difference)
        if not torch.equal(new.isfinite(), old.isfinite()) or difference > scale * TOLERANCE.get(
            old.dtype, 5e-2
        ):
            raise VerificationError(
                f"the converted model computes another function for context {name}: outputs up to "
                f"{scale:.3g} differ by {difference:.3g}; the model is unchanged"
            )
