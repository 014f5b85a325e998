"""Packages that only some functions need, imported when those are called."""

from importlib import import_module
from types import ModuleType

from normswap.errors import NormswapError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module that an extra of this package brings.

    Args:
        module: dotted name.
        extra: what brings it.
        purpose: what it is for, as the subject of "needs".

    Raises:
        NormswapError: it is not installed, or fails to import.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise NormswapError(
            f"{purpose} needs {module.partition('.')[0]}, which fails to import ({error}); "
            f"pip install 'normswap[{extra}]'"
        ) from error
