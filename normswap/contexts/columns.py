"""Contexts from metadata: the values of columns, those of numeric ones in bins."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from normswap.contexts.assigner import UNKNOWN, Assigner
from normswap.contexts.read_rows import Row, Rows, as_text, read_rows
from normswap.errors import ContextError, UnknownNameError


class ColumnAssigner(Assigner):
    """Labels rows of metadata by the values of some columns together.

    A row of a combination not met before, or without one of the values, is unknown (-1). The outer
    bins of a numeric column are open, so that every number falls into one.

    Attributes:
        columns: what decides.
        edges: inner edges of the bins of binned columns; a bin holds its lower edge.
    """

    kind = "columns"

    def __init__(
        self,
        keys: Sequence[tuple[str, ...]],
        columns: Sequence[str],
        edges: Mapping[str, Sequence[float]],
    ) -> None:
        self.columns = tuple(columns)
        self.edges = {name: tuple(values) for name, values in edges.items()}
        self.keys = tuple(keys)
        super().__init__([" / ".join(key) for key in self.keys])

    def __call__(self, batch: Rows) -> Tensor:
        """Return the context of each row: a CSV file, dicts, or a dict of columns."""
        return self.label(row_keys(read_rows(batch), self.columns, self.edges))

    def label(self, keys: Iterable[tuple[str, ...] | None]) -> Tensor:
        """Return the context of each combination of values, None where one is missing."""
        index: dict[Any, int] = {key: k for k, key in enumerate(self.keys)}
        return torch.tensor(
            [index.get(key, UNKNOWN) for key in keys], dtype=torch.int64, device="cpu"
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return columns, edges and combinations of values."""
        return {"columns": self.columns, "edges": self.edges, "keys": self.keys}, {}

    @classmethod
    def restore(
        cls, names: list[str], record: dict[str, Any], arrays: dict[str, Tensor], features: Any
    ) -> "ColumnAssigner":
        """Rebuild; see `Assigner`."""
        keys = [tuple(map(str, key)) for key in record["keys"]]
        edges = {name: [float(edge) for edge in inner] for name, inner in record["edges"].items()}
        assigner = cls(keys, record["columns"], edges)
        if assigner.names != tuple(names):
            raise ValueError(f"names are {names}, of keys {record['keys']}")
        return assigner


def from_columns(
    rows: Rows,
    columns: str | Sequence[str],
    bins: Mapping[str, int | Sequence[float]] | None = None,
    target: str | None = None,
) -> ColumnAssigner:
    """Make a context of each combination of values that occurs in some columns.

    Values are compared as text; 3, 3.0, "3" and "3.0" are one. Empty text, None, NaN and
    pandas' NA and NaT are missing.

    Args:
        rows: a CSV file with a heading, dicts one a row, or a dict of columns.
        columns: which decide, one or several.
        bins: for numeric columns, how many bins of about equal counts (quantiles), or the inner
            edges between them; an edge belongs to the bin above.
        target: column of the class, to find whether contexts give it away.

    Returns:
        An assigner of rows; its `labels` are those of `rows`.

    Raises:
        UnknownNameError: a column that no row has.
        ContextError: no rows, no row with all the values, a binned value that is no number, edges
            that do not rise, or fewer different numbers than bins.

    Warns:
        ContextWarning: of tiny contexts, and of ones that give the target away.
    """
    table = read_rows(rows)
    chosen = (columns,) if isinstance(columns, str) else tuple(columns)
    if bins is not None and not isinstance(bins, Mapping):
        raise ContextError(f"expected bins= as column -> a count or edges, got {bins!r}")
    given = dict(bins or {})
    if not chosen or len(set(chosen)) < len(chosen):
        raise ContextError(f"expected columns= as different names, got {columns!r}")
    if not table:
        raise ContextError("expected rows of metadata, got none")
    headings = dict.fromkeys(key for row in table for key in row)
    for name in chosen if target is None else (*chosen, target):
        if name not in headings:
            names = ", ".join(map(repr, headings))
            raise UnknownNameError(f"no column {name!r}; the columns are {names}")
    if extra := [name for name in given if name not in chosen]:
        raise ContextError(f"expected bins= of columns that decide, got {', '.join(extra)}")
    edges = {name: _edges(table, name, wanted) for name, wanted in given.items()}
    found = row_keys(table, chosen, edges)
    present = {key for key in found if key is not None}
    if not present:
        raise ContextError(f"no row has a value in every column of {', '.join(chosen)}")
    assigner = ColumnAssigner(_order(present, chosen, edges), chosen, edges)
    classes = None if target is None else [as_text(row.get(target)) for row in table]
    assigner.count(assigner.label(found), classes)
    assigner.warn()
    return assigner


def row_keys(
    table: Iterable[Row], columns: Sequence[str], edges: Mapping[str, Sequence[float]]
) -> list[tuple[str, ...] | None]:
    """Return what decides the context of each row; None where a value is missing."""
    keys: list[Any] = []
    for row in table:
        texts = [
            _bin(row.get(name), name, edges[name]) if name in edges else as_text(row.get(name))
            for name in columns
        ]
        keys.append(None if None in texts else tuple(texts))
    return keys


def _number(value: Any, name: str) -> float | None:
    """Return a value as a number, None where it is missing."""
    text = as_text(value)
    if text is None or text.lower() == "nan":
        return None
    try:
        return float(text)
    except ValueError:
        raise ContextError(
            f"expected numbers in the binned column {name!r}, got {text!r}"
        ) from None


def _bin(value: Any, name: str, edges: Sequence[float]) -> str | None:
    number = _number(value, name)
    return None if number is None else _bin_names(name, edges)[bisect.bisect_right(edges, number)]


def _bin_names(name: str, edges: Sequence[float]) -> list[str]:
    texts = [as_text(float(edge)) for edge in edges]
    inner = [f"{low} <= {name} < {high}" for low, high in pairwise(texts)]
    return [f"{name} < {texts[0]}", *inner, f"{name} >= {texts[-1]}"]


def _edges(table: Sequence[Row], name: str, wanted: int | Sequence[float]) -> list[float]:
    if not isinstance(wanted, int):
        try:
            edges = [float(edge) for edge in wanted]
        except (TypeError, ValueError) as error:
            raise ContextError(f"expected numbers as edges for {name!r}: {error}") from error
        rising = all(low < high for low, high in pairwise(edges))
        if not edges or not rising or not all(map(math.isfinite, edges)):
            raise ContextError(f"expected rising finite edges for {name!r}, got {list(wanted)}")
        return edges
    given = [_number(row.get(name), name) for row in table]
    numbers = sorted(n for n in given if n is not None and math.isfinite(n))
    if wanted < 2:
        raise ContextError(f"expected two bins or more for {name!r}, got {wanted}")
    # The first number of each bin after the first; equal numbers stay together.
    edges = [numbers[round(i * len(numbers) / wanted)] for i in range(1, wanted)] if numbers else []
    if len(set(edges)) < wanted - 1 or edges[0] == numbers[0]:
        raise ContextError(
            f"expected enough different numbers in {name!r} for {wanted} bins of about equal "
            f"counts, got {len(set(numbers))}; ask for fewer, or give the edges"
        )
    return edges


def _order(
    keys: Iterable[tuple[str, ...]], columns: Sequence[str], edges: Mapping[str, Sequence[float]]
) -> list[tuple[str, ...]]:
    """Return combinations in the order of their values: bins and numbers by size, text after."""
    bins = {name: _bin_names(name, edges[name]) for name in edges}

    def rank(name: str, text: str) -> tuple[float, str]:
        if name in bins:
            return bins[name].index(text), ""
        try:
            number = float(text)
        except ValueError:
            return math.inf, text
        return (math.inf if math.isnan(number) else number), text

    return sorted(keys, key=lambda key: [rank(*pair) for pair in zip(columns, key, strict=True)])
