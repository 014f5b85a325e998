"""Where methods come from: the files of this folder, and entry points of other packages."""

import functools
import importlib
import pkgutil
import sys
import warnings
from importlib.metadata import entry_points

GROUP = "normswap.methods"


@functools.cache
def import_own() -> None:
    """Import every file of this folder; those that hold a method register it."""
    for module in pkgutil.iter_modules(sys.modules[__package__].__path__):
        importlib.import_module(f"{__package__}.{module.name}")


@functools.cache
def import_installed() -> None:
    """Load what installed packages name in the entry-point group `GROUP`.

    Each entry is a module, or a class in one, that registers a method.

    Warns:
        UserWarning: an entry that fails; the others are there all the same.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            package = "an unknown package" if entry.dist is None else entry.dist.name
            warnings.warn(
                f"the method {entry.name!r} of {package} is not there: loading its entry point "
                f"{entry.value!r} ({GROUP}) failed with {type(error).__name__}: {error}",
                stacklevel=3,
            )
