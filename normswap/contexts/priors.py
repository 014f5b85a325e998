"""Prior probabilities of contexts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normswap.errors import ConversionError
from normswap.functional.labels import Labels, resolve_labels
from normswap.util.arguments import describe

_LEAST = 1e-12


def uniform_priors(num_contexts: int) -> Tensor:
    """Return lambda_k = 1 / K, (K,) float64."""
    return torch.full((num_contexts,), 1 / num_contexts, dtype=torch.float64, device="cpu")


def check_priors(priors: Tensor | Sequence[float] | None, num_contexts: int) -> Tensor:
    """Return priors as float64 (K,) that sum to one; counts are accepted, None is uniform.

    Raises:
        ConversionError: not K values, or one that is not positive and finite.
    """
    if priors is None:
        return uniform_priors(num_contexts)
    try:
        dtype = None if isinstance(priors, Tensor) else torch.float64
        values = torch.as_tensor(priors, dtype=dtype, device="cpu").detach()
        if values.is_complex() or values.is_nested or values.layout != torch.strided:
            raise TypeError
        values = values.double()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConversionError(
            f"expected `priors` as {num_contexts} numbers, one a context, got {describe(priors)}"
        ) from None
    if values.shape != (num_contexts,):
        raise ConversionError(
            f"expected `priors` with {num_contexts} values, one a context, got shape "
            f"{tuple(values.shape)}; normswap.contexts.count_priors makes them from labels"
        )
    total = values.sum()
    if not bool((values.isfinite() & (values > 0)).all()) or not bool(total.isfinite()):
        raise ConversionError(f"expected positive finite `priors`, got {describe(values.tolist())}")
    shares = values / total
    if float(shares.min()) < _LEAST:
        raise ConversionError(
            f"expected `priors` of at least {_LEAST:g} of their sum, by whose root the layers "
            f"divide, got {float(shares.min()):.3g} of it"
        )
    return shares


def count_priors(labels: Labels, contexts: int | Sequence[str]) -> Tensor:
    """Return the share of each context among labels, (K,) float64; -1 is left out.

    Args:
        labels: integer labels or names of a training set, (N,).
        contexts: K, or the names of the contexts.

    Raises:
        ConversionError: a context without any label.
        ContextError: labels out of range.
    """
    names = [str(k) for k in range(contexts)] if isinstance(contexts, int) else list(contexts)
    indices = resolve_labels(labels, len(names), names).labels.cpu()
    counts = torch.bincount(indices[indices >= 0], minlength=len(names))
    absent = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if absent:
        raise ConversionError(f"no label of context {', '.join(absent)}; priors must be positive")
    return counts.double() / counts.sum()
