"""What to say where labels cannot follow the rows of a norm, and what to do about it."""

from torch import Tensor
from torch.utils._pytree import tree_leaves

from normswap.errors import ContextError
from normswap.functional.backend import is_readable
from normswap.functional.labels import Context
from normswap.graph.rows.decode import MADE_OF_SEVERAL
from normswap.graph.rows.plans import ANY, Step
from normswap.graph.rows.run import Run
from normswap.util.arguments import describe

_ALIGN = (
    "; where row i is of sample i all the same, as nodes of a graph are, convert without "
    "example_inputs= and declare it by normswap.fix_rows(model, aligned=True)"
)


def not_aligned(site: str, rows: int, labels: int) -> ContextError:
    """Return the error for rows that cannot be those that were declared."""
    return ContextError(
        f"expected a row a label at {site}, since normswap.fix_rows(model, aligned=True) declared "
        f"row i to be of sample i, got {rows} rows for {labels} labels; leave the norm out with "
        f"exclude={site!r}"
    )


def refuse_cause(run: Run, site: str, rows: int, cause: str) -> Step:
    """Raise for a finding that labels cannot follow; see `_refuse`."""
    declared = rows == run.samples and MADE_OF_SEVERAL in cause
    return _refuse(
        run.context,
        f"expected each row of the input of {site} to be of one sample, got {cause}, so that "
        f"labels cannot follow{_beside(run)}; leave the norm out with exclude={site!r}, or give "
        f"each call samples of one context{_ALIGN if declared else ''}",
    )


def refuse_unknown(context: Context, site: str, rows: int, why: str) -> Step:
    """Raise where nothing tells whose the rows are; see `_refuse`."""
    return _refuse(
        context,
        f"expected to know which of the {rows} rows of the input of {site} belong to which of "
        f"{context.labels.shape[0]} samples, got nothing that tells ({why}); run the whole model "
        "in this mode, not compiled, on samples that differ, after normswap.fix_rows(model) where "
        f"their order never changes, or leave the norm out with exclude={site!r}",
    )


def _refuse(context: Context, message: str) -> Step:
    """Raise, unless all labels are the same.

    Raises:
        ContextError: the message.
    """
    labels = context.labels
    if is_readable(labels) and bool((labels == labels[0]).all()):
        return Step("", False, 0, ANY)
    raise ContextError(message)


def _beside(run: Run) -> str:
    """Return what to say of an argument that seems to hold the samples in another dimension."""
    tensors = (v for v in tree_leaves(run.values) if isinstance(v, Tensor) and v.dim() > 1)
    odd = next((t for t in tensors if t.shape[0] != run.samples == t.shape[1]), None)
    return "" if odd is None else f" (samples are dimension 0, and one argument is {describe(odd)})"
