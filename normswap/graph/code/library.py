"""Whose code a module of Python is: a library's, or a user's."""

import functools
import sys


def is_torch(module_name: str | None) -> bool:
    """Return whether a module is part of torch itself, or of this package."""
    return module_name is not None and (
        module_name == "torch" or module_name.startswith(("torch.", "normswap."))
    )


@functools.cache  # every function that runs while a trace does is asked
def is_library(module_name: str | None) -> bool:
    """Return whether a module is part of torch, of Python or of this package."""
    if module_name is None:
        return False
    # What makes a named tuple is code of the standard library under a name of its own.
    standard = module_name.partition(".")[0] in sys.stdlib_module_names
    return standard or module_name.startswith("namedtuple_") or is_torch(module_name)
