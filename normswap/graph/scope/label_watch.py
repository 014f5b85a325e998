"""Warn, once, of labels that tell a model nothing: a loader may drop or garble them in silence."""

import warnings
from collections.abc import Sequence

import torch

from normswap.errors import ContextWarning
from normswap.functional.labels import Context, host_range
from normswap.graph.rows.run import is_measuring

# Forwards with labels in training after which their lack, or sameness, is no accident.
_ENOUGH = 20


class LabelWatch:
    """What labels the forwards of a model and its copies had; the host never waits to know it.

    Attributes:
        quiet: whether there is nothing more to warn of, or the user chose it so.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._forwards = 0
        self._range: tuple[int, int] | None = None
        self._is_single = True

    def note(self, context: Context | None, training: bool, names: Sequence[str]) -> None:
        """Take note of a forward of the whole model, or of a part without labels.

        Warns:
            ContextWarning: the first twenty labelled forwards in training had one context, or
                unknown labels only; or a forward in eval has no labels after these had.
        """
        # Asked first, so that compiled code has no guard on the rest.
        if torch.compiler.is_compiling() or self.quiet or len(names) == 1 or is_measuring():
            return
        if training and context is not None and self._forwards < _ENOUGH:
            self._forwards += 1
            found = host_range(context.labels)
            one = found is not None and found[0] == found[1]
            self._is_single &= one and self._range in (None, found)
            self._range = found
            if self._forwards == _ENOUGH and self._is_single and found is not None:
                self._warn_single(found[0], names)
        elif not training and context is None and self._forwards == _ENOUGH:
            self._warn(
                "a forward in eval mode has no labels, where those in training had: its samples "
                "count as unknown. A loader or collator may drop labels (that of transformers "
                "drops strings). Pass context=, or choose what unknown samples get with "
                "normswap.set_unknown(model, ...), which ends this warning"
            )

    def _warn_single(self, label: int, names: Sequence[str]) -> None:
        what = "unknown (-1)" if label < 0 else f"of context {names[label]!r}"
        self._warn(
            f"all labels of the first {_ENOUGH} forwards in training are {what}, of "
            f"{len(names)} contexts: the others learn nothing. Check labels, or shuffle the data"
        )

    def _warn(self, message: str) -> None:
        self.quiet = True
        warnings.warn(message, ContextWarning, stacklevel=2)
