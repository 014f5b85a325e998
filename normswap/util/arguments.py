"""Arguments of a caller, checked: what was expected, what came, and what was probably meant."""

import difflib
import inspect
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, NormswapError, UnknownNameError

# Contexts or components a model may have: each norm keeps a row for each.
MOST_CONTEXTS = 100_000
MOST_FEATURES = 1 << 24


def describe(value: Any) -> str:
    """Return what a value is, for a message of one line."""
    if isinstance(value, nn.Module):
        return f"the module {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        if isinstance(value, Tensor):
            return f"a tensor {tuple(value.shape)} of {str(value.dtype)[6:]}"
        text = " ".join(repr(value).split())
    except Exception:  # a nested tensor has no shape, and a repr of a user's may fail
        return f"an object of class {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str], shown: int = 20) -> str:
    """Return names for a message, the first few."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def meant(given: Any, choices: Iterable[str], form: str = "{!r}") -> str:
    """Return the question whether the closest of some names was meant, "" where none is close.

    Capitals count for nothing.
    """
    names = {name.casefold(): name for name in choices}
    close = difflib.get_close_matches(given.casefold(), names, 1) if isinstance(given, str) else []
    return f"; did you mean {form.format(names[close[0]])}?" if close else ""


def unknown_name(what: str, given: Any, choices: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that is none of the choices: it lists them, and the closest.

    `what` says of what kind the names are, such as "method".
    """
    names = list(choices)
    shown = repr(given) if isinstance(given, str) else describe(given)
    return UnknownNameError(
        f"unknown {what} {shown}; the choices are {listed(names)}{meant(given, names)}"
    )


def check_choice(what: str, given: Any, choices: Iterable[str]) -> None:
    """Raise if a value is none of some names; see `unknown_name`."""
    names = list(choices)
    if not isinstance(given, str) or given not in names:
        raise unknown_name(what, given, names)


def check_flag(name: str, value: Any, error: type[NormswapError] = ConversionError) -> None:
    """Raise if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise error(f"expected {name}= as True or False, got {describe(value)}")


def check_count(
    name: str,
    value: Any,
    least: int = 1,
    most: int | None = None,
    error: type[NormswapError] = ConversionError,
) -> None:
    """Raise if a value is no integer in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise error(f"expected {name}= as a count, got {describe(value)}")
    if value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if value < least else f"in [{least}, {most}]"
        raise error(f"expected {name}= {bounds}, got {describe(value)}")


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    error: type[NormswapError] = ConversionError,
) -> None:
    """Raise if a value is no finite number in [low, high], or (low, high] with `open_low`."""
    above = f"{'(' if open_low else '['}{low:g}, "
    bounds = f"{above}inf)" if high == math.inf else f"{above}{high:g}]"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise error(f"expected {name}= as a number in {bounds}, got {describe(value)}")
    if not low <= value <= high or value == math.inf or (open_low and value == low):
        raise error(f"expected {name}= in {bounds}, got {describe(value)}")


def as_count(value: Any) -> int | None:
    """Return an integer of any kind, such as NumPy's, as one of Python's; None for what is none."""
    flag = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        return None if flag else operator.index(value)
    except (TypeError, RuntimeError):  # a tensor on the meta device has no value
        return None


def check_callable(name: str, value: Any, form: str, count: int) -> None:
    """Raise if a value is neither None nor a function of as many arguments.

    `form` shows how it is called, such as ``forward(model, batch)``.
    """
    if value is None:
        return
    fits = callable(value) and not isinstance(value, nn.Module)
    if fits:
        try:
            inspect.signature(value).bind(*range(count))
        except TypeError:
            fits = False
        except ValueError:  # a builtin without a signature
            pass
    if not fits:
        raise ConversionError(
            f"expected {name}= as a function called as {form}, got {describe(value)}"
        )
