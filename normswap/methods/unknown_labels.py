"""The policies for samples without a label: what each is, and which of three ways a layer goes.

A sample labelled -1 takes one row of the tables (`row_unlabelled`), what all contexts are together
("pooled"), or weighs the contexts for itself (`weighs`). What a way computes is each layer's.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.errors import ContextError, MissingContextError
from normswap.functional.labels import Context, is_under_vmap
from normswap.util.arguments import describe

POLICIES = ("error", "pooled", "posterior")


def check_unknown(unknown: Any, num_contexts: int) -> None:
    """Check the name of a policy, or the index of a context.

    Raises:
        ContextError: neither.
    """
    index = type(unknown) is int and 0 <= unknown < num_contexts
    if not index and not (isinstance(unknown, str) and unknown in POLICIES):
        raise ContextError(
            f"expected unknown= one of {', '.join(POLICIES)} or the index of a context in "
            f"[0, {num_contexts}), got {describe(unknown)}"
        )


class UnknownLabels:
    """What a layer with contexts does about samples that have no label.

    Attributes:
        unknown: a policy, or the index of the context whose row they take.
        answering: how many contexts, the first ones, answer for them; None for all.
    """

    unknown: str | int
    num_contexts: int
    answering: int | None
    names: tuple[str, ...]
    training: bool

    def row_unlabelled(self, *tables: Tensor) -> list[Tensor] | None:
        """Return the row of each table, (1, C), for samples without a label, None if several."""
        if isinstance(self.unknown, int):
            return [t[self.unknown : self.unknown + 1] for t in tables]
        if self.unknown == "error":
            # Reached only where the host cannot see the labels; wrong results must be visible.
            return [torch.full_like(t[:1], torch.nan) for t in tables]
        return None

    def pooled_contexts(self, unlabelled: bool) -> tuple[int, int] | None:
        """Return from which to which context samples without a label are pooled over.

        All, one, or none if that is an error; None where there is no such sample.
        """
        if not unlabelled:
            return None
        if isinstance(self.unknown, int):
            return self.unknown, self.unknown + 1
        return 0, 0 if self.unknown == "error" else self.answering or self.num_contexts

    def weighs(self, unlabelled: bool) -> bool:
        """Return whether samples without a label weigh the contexts, each for itself."""
        return unlabelled and self.unknown == "posterior" and self.num_contexts > 1

    def labels_of_none(self, x: Tensor, where: str) -> Tensor | None:
        """Return the labels of a batch that came without: None where the policy decides.

        Raises:
            MissingContextError: the mode or the policy needs labels.
        """
        if self.num_contexts == 1:
            return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        if self.training or self.unknown == "error":
            why = "in training mode" if self.training else "with unknown='error'"
            raise MissingContextError(
                f"expected `context`, one label per sample, {why}, got none (at {where}; "
                f"contexts: {', '.join(self.names)}); pass context= to the model or wrap the call "
                "in normswap.use_context(model, labels)"
            )
        return None

    def refuse_unknown(self, context: Context, where: str) -> None:
        """Refuse a batch in which a label is unknown where the policy is "error".

        Raises:
            MissingContextError: one is, as far as the host can see; else the device asserts it.
        """
        if self.unknown != "error" or context.unknown is False:
            return
        if context.unknown:
            raise MissingContextError(
                f"expected a known `context` for every sample with unknown='error', got -1 "
                f"(at {where}); label them or convert with another unknown="
            )
        labels = context.labels
        if torch.compiler.is_compiling() or type(labels) is not Tensor or is_under_vmap(labels):
            return  # there a -1 gives NaN
        torch._assert_async((labels >= 0).all(), "unknown='error', got a label -1")
