"""The errors and warnings of the package; an error also inherits the builtin one would expect."""

from typing import Any, NoReturn

from torch import nn


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


class ContractError(NormswapError, AssertionError):
    """A method does something else than the package relies on."""


class InputError(NormswapError, ValueError):
    """A tensor given to a layer has another shape than the layer takes."""


class AdviceWarning(UserWarning):
    """A conversion that works, where another is known to serve better."""


class ContextWarning(UserWarning):
    """The contexts can be used as they are, but something about them may mislead."""


def expect_module(model: Any) -> None:
    """Raise if what was given as a model is none.

    Raises:
        ConversionError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConversionError(f"expected a torch.nn.Module, got {what}")


def not_converted(model: Any, instead: str = "") -> ConversionError:
    """Return the error of what was given for a converted model; `instead` says what else helps."""
    return ConversionError(
        f"expected a converted model, got {type(model).__name__}; call normswap.convert first"
        f"{instead}"
    )


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Refuse to script a converted module, as its ``__prepare_scriptable__``.

    Raises:
        ConversionError: always.
    """
    raise ConversionError(
        f"cannot script {type(module).__name__}, which is converted; script "
        "normswap.specialize(model, context), a plain model, or use torch.jit.trace or torch.export"
    )
