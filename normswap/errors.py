"""The errors and warnings of the package; an error also inherits the builtin one would expect."""

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class NormswapError(Exception):
    """Base of every error this package raises on purpose."""


class ConversionError(NormswapError, ValueError):
    """The model, or an option, cannot be converted as asked; nothing was changed."""


class ContextError(NormswapError, ValueError):
    """The context labels do not fit (value, length, type, device), or none can be made of this."""


class MissingContextError(ContextError):
    """A label is needed here and none was given."""


class UnknownNameError(NormswapError, KeyError):
    """A name is not among the choices, which the message lists."""

    def __str__(self) -> str:
        """Return the message itself; KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class CheckpointError(NormswapError, ValueError):
    """A saved conversion cannot be written or read, or belongs to another model."""


class VerificationError(NormswapError, RuntimeError):
    """The converted model computes another function than the original."""


class InputError(NormswapError, ValueError):
    """A tensor given to a layer has another shape than the layer takes."""


class ContextWarning(UserWarning):
    """The contexts can be used as they are, but something about them may mislead."""


def describe(value: Any) -> str:
    """Return what a value is, for a message of one line."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype)[6:]}"
    if isinstance(value, nn.Module):
        return f"the module {type(value).__name__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the repr of what a user gave may itself fail
        text = "(no repr)"
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{type(value).__name__} {shown}"


def unknown_name(what: str, given: Any, choices: Iterable[str], of: str = "") -> str:
    """Return the message for a name that is none of the choices: the closest one, and all.

    Args:
        what: what kind of name it is, "method".
        given: the name.
        choices: all names.
        of: what the choices belong to.
    """
    names = list(choices)
    close = difflib.get_close_matches(given, names, 1, 0.5) if isinstance(given, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    shown = repr(given) if isinstance(given, str) else describe(given)
    return f"unknown {what} {shown}{of}{hint} the choices are {', '.join(names) or 'none'}"


def expect_module(model: Any) -> None:
    """Raise if what was given as a model is none.

    Raises:
        ConversionError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else describe(model)
        raise ConversionError(f"expected a torch.nn.Module, got {what}")
