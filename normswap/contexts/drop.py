"""Training that hides labels now and then, for use where they are not always known."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from normswap.errors import ContextError
from normswap.util.arguments import check_number, describe


@overload
def drop_labels(labels: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor: ...
@overload
def drop_labels(
    labels: Sequence[str | int | None], p: float, generator: torch.Generator | None = None
) -> list[str | int | None]: ...
def drop_labels(
    labels: Tensor | Sequence[str | int | None], p: float, generator: torch.Generator | None = None
) -> Tensor | list[str | int | None]:
    """Return labels of which each is unknown with probability p, drawn anew by every call.

    For the labels of a training step: a model that never met a sample without a label was not
    trained for one. A quarter was enough where it was measured, and cost some of what the labels
    gain.

    Args:
        labels: integers (N,), or a sequence of names, indices or None.
        p: in [0, 1].
        generator: of the draws, on the device of labels in a tensor, else on the CPU; torch's own
            by default.

    Returns:
        int64 (N,) with -1 for what was dropped, on the device of the labels; or a list with None.

    Raises:
        ContextError: labels that are not one a sample, or a p out of range.
    """
    check_number("p", p, 0, 1, error=ContextError)
    if isinstance(labels, Tensor):
        integers = not (labels.is_floating_point() or labels.is_complex())
        if labels.dim() != 1 or not integers or labels.dtype == torch.bool:
            raise ContextError(
                "expected labels as integers (N,), one a sample, "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        dropped = torch.rand(len(labels), device=labels.device, generator=generator) < p
        return labels.to(torch.int64).masked_fill(dropped, -1)
    found: Any = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ContextError(f"expected a label for each sample, got {describe(labels)}")
    draws = torch.rand(len(found), generator=generator, device="cpu").tolist()
    return [None if draw < p else label for draw, label in zip(draws, found, strict=True)]
