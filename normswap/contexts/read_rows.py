"""Rows of metadata, in the forms they come in."""

import csv
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.errors import ContextError

_MISSING = ("NAType", "NaTType")  # what pandas has in place of missing values

Row = Mapping[str, Any]
Rows = str | os.PathLike[str] | Mapping[str, Sequence[Any] | Tensor] | Iterable[Row]


def read_rows(rows: Rows) -> list[Row]:
    """Return rows of metadata in any accepted form as dicts.

    Raises:
        ContextError: a file that cannot be read, columns of different lengths, or another form.
    """
    if isinstance(rows, str | os.PathLike):
        return _read_csv(rows)
    if isinstance(rows, Mapping):
        columns = {
            name: [values] if isinstance(values, str) else list(values)
            for name, values in rows.items()
        }
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ContextError(f"expected columns of one length, got {lengths}")
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
    table = list(rows) if isinstance(rows, Iterable) else [rows]
    for row in table:
        if not isinstance(row, Mapping):
            raise ContextError(
                f"expected rows as dicts, a dict of columns or a CSV file, got {row!r:.80}; of a "
                'pandas frame give frame.to_dict("records")'
            )
    return table


def _read_csv(path: str | os.PathLike[str]) -> list[Row]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ContextError(f"cannot read the CSV file {os.fspath(path)}: {error}") from error
    for number, row in enumerate(table, start=2):
        if None in row:
            raise ContextError(f"row {number} of {os.fspath(path)} has more cells than the heading")
    return [dict(row) for row in table]


def as_text(value: Any) -> str | None:
    """Return a value as text, None where it is missing; whole numbers are written one way."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    text = "" if value is None or type(value).__name__ in _MISSING else str(value).strip()
    # As a table with gaps writes whole numbers.
    whole = re.fullmatch(r"(-?\d+)\.0+", text)
    return (whole[1] if whole else text) or None
