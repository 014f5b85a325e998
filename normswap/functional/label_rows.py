"""One label for each row of what a norm is given, of labels checked at the entry of a model."""

from typing import Any, Protocol

import torch
from torch import Tensor

from normswap.errors import ContextError
from normswap.functional.backend import is_traced
from normswap.functional.labels import Context, Labels, kept, with_memo


class Layer(Protocol):
    """A layer that takes labels."""

    training: bool
    scope: "SharedScope | None"


class SharedRows(Protocol):
    """How the rows that layers are given follow from the samples of a call."""

    def find(self, layer: Layer, site: str, x: Tensor, context: Context) -> Any:
        """Return ``how`` and ``index`` of a layer's rows; None where one label holds for all."""

    def describe(self, site: str) -> str:
        """Say for a summary where the rows of a layer come from."""


class SharedScope(Protocol):
    """What the layers of a converted model share: labels of a call, and rows."""

    @property
    def rows(self) -> SharedRows:
        """The rows of the layers."""

    @property
    def model(self) -> "SharedScope":
        """The scope of the whole model, for that of a copied part."""

    def lookup(self) -> Context | None:
        """Return the labels in scope."""

    def resolve(self, labels: Labels, device: torch.device | None = None) -> Context:
        """Check labels against the model's contexts."""


def labels_per_row(
    context: Context, x: Tensor, site: str, how: str = "", index: Tensor | None = None
) -> Tensor:
    """Return one label per row of x, (rows,), given one per sample.

    A model may fold tokens or windows into the batch: rows = r * N. Where it is "repeated", all
    labels are repeated r times, else each label r times. One label for a whole batch, or for "any"
    row, is expanded; see `one_label`.

    Args:
        context: labels.
        x: what a norm is given.
        site: name of the norm.
        how: "repeated", "any", or anything else.
        index: the sample of each row, (rows,), where no rule tells.

    Raises:
        ContextError: labels without values where x has some, or rows not a multiple of N.
    """
    labels = context.labels
    if labels.is_meta and not x.is_meta:
        raise ContextError(
            f"expected `context` on {x.device}, where the input of {site} is, got it on "
            f"{labels.device}; move it with .to({str(x.device)!r})"
        )
    if labels.device != x.device:
        # A model may be spread over several devices; labels enter it on that of its inputs.
        labels = kept(labels, x.device, lambda: with_memo(context.labels.to(x.device)))
    rows, given = x.shape[0], labels.shape[0]
    if context.whole or how == "any":
        return labels[:1].expand(rows)
    if index is None and rows == given:
        return labels
    if index is None and (given == 0 or rows % given):
        raise wrong_length(rows, given, site)

    def derive() -> Tensor:
        if index is not None:
            return with_memo(labels[index])
        times = rows // given
        repeated = how == "repeated"
        return with_memo(labels.repeat(times) if repeated else labels.repeat_interleave(times))

    if torch.compiler.is_compiling():  # nothing is kept there, and torch 2.9 traces no id()
        return derive()
    # The memo holds the index, so that its id stays its own.
    return kept(labels, (rows, how, id(index)), lambda: (derive(), index))[0]


def one_label(labels: Tensor) -> Tensor:
    """Return the one label, (1,), of labels that are one expanded; else the labels as they are.

    What is traced from one example has to take labels of any other, so there they all stay.
    """
    if is_traced():
        return labels
    return labels[:1] if labels.stride(0) == 0 and labels.shape[0] > 0 else labels


def wrong_length(samples: int | str, given: int, site: str) -> ContextError:
    """Return the error for labels that do not match the batch."""
    return ContextError(
        f"expected `context` with {samples} labels, one per sample, got {given} "
        f"(first norm: {site}); pass context= or use normswap.use_context, in the order of "
        "dimension 0 of the inputs, where samples are"
    )
