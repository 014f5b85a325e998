"""What a caller asks of a conversion, checked before anything is copied or changed."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor

from normswap.contexts.assigner import Assigner
from normswap.contexts.priors import check_priors
from normswap.conversion.presets import fill_from_preset
from normswap.errors import ContextWarning, ConversionError
from normswap.lifecycle.record import policy_of
from normswap.methods.base import BaseMethod, Contexts, get_method
from normswap.methods.registry import parse_options
from normswap.util.arguments import MOST_CONTEXTS, as_count, describe
from normswap.util.select import Selector, read_selector


@dataclass(frozen=True)
class Settings:
    """A method, its options, contexts, and where it goes."""

    method: BaseMethod
    options: Any
    contexts: Contexts
    placement: str | None
    select: Selector
    exclude: Selector


def read_settings(
    called: Callable[..., Any],
    method: str,
    contexts: int | Sequence[str] | Assigner | None,
    select: Selector,
    exclude: Selector,
    placement: str | None,
    preset: str | None,
    unknown: str | None,
    priors: Any,
    options: Mapping[str, Any],
) -> Settings:
    """Check the arguments of `convert` or `plan`, and fill in what a preset says.

    An unknown option may have meant another argument of the function that was called.

    Raises:
        ConversionError: an argument of another kind, an unknown option, or contexts that do not
            fit.
        UnknownNameError: a name that is none of the choices.
    """
    chosen = get_method(method)
    if placement is not None and not isinstance(placement, str):
        raise ConversionError(f"expected placement= as a name, got {describe(placement)}")
    select, exclude = read_selector("select", select), read_selector("exclude", exclude)
    placement, select, given = fill_from_preset(preset, method, placement, select, dict(options))
    read = parse_options(chosen, given, signature(called).parameters)
    made = make_contexts(chosen, contexts, priors, unknown)
    return Settings(chosen, read, made, placement, select, exclude)


def make_contexts(
    method: BaseMethod,
    contexts: int | Sequence[str] | Assigner | None,
    priors: Any,
    unknown: str | None,
) -> Contexts:
    """Check what the caller says of the contexts.

    Raises:
        ConversionError: any of these for a method that takes none; no, repeated, or too many
            names; priors that do not fit.
        UnknownNameError: `unknown` is neither a policy nor a context.
    """
    if not method.needs_context:
        given = {"contexts": contexts, "priors": priors, "unknown": unknown}
        for name, value in given.items():
            if value is not None:
                raise ConversionError(
                    f"method {method.name!r} takes no contexts, got {name}={describe(value)}; "
                    "leave it out, or choose a method that needs labels"
                )
    if isinstance(contexts, Assigner):
        priors = contexts.priors if priors is None else priors
        contexts = contexts.names
    names = _names(1 if contexts is None else contexts)
    policy = method.unknown if unknown is None else unknown
    return Contexts(names, check_priors(priors, len(names)), policy_of(policy, names))


def _names(contexts: Any) -> tuple[str, ...]:
    """Return the names of the contexts, numbers where there are none."""
    if (count := as_count(contexts)) is not None:
        contexts = count
    elif hasattr(contexts, "tolist") and not isinstance(contexts, Tensor):
        contexts = contexts.tolist()  # an array, or a column of a table
    if isinstance(contexts, str):
        raise ConversionError(f"expected several names, got one string; write [{contexts!r}]")
    if isinstance(contexts, bool) or not isinstance(contexts, int | Sequence):
        raise ConversionError(
            f"expected contexts= as a count or a sequence of names, got {describe(contexts)}"
        )
    count = contexts if isinstance(contexts, int) else len(contexts)
    if count > MOST_CONTEXTS:
        raise ConversionError(
            f"expected contexts= of at most {MOST_CONTEXTS:,}, for each of which every norm has a "
            f"row, got {count:,}"
        )
    names = tuple(map(str, range(count))) if isinstance(contexts, int) else tuple(contexts)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ConversionError(
            f"expected names of contexts as strings, got {describe(odd[0])} among them; write "
            "[str(name) for name in names], or give a count where labels are 0, 1 and so on"
        )
    if not names or len(set(names)) < len(names):
        raise ConversionError(
            f"expected at least one context, names distinct, got {describe(contexts)}"
        )
    if any(n.isdecimal() and k != int(n) < count for k, n in enumerate(names)):
        warnings.warn(
            f"a name among contexts={describe(contexts)} is the number of another context: a label "
            "that is a number is an index, so give these labels as names",
            ContextWarning,
            stacklevel=2,
        )
    return names
