"""Which code is a forward's own, and which is a library's."""

import sys


def is_torch(module_name: str | None) -> bool:
    """Return whether a module is part of torch itself."""
    return module_name is not None and (
        module_name == "torch" or module_name.startswith(("torch.", "normswap."))
    )


def is_library(module_name: str | None) -> bool:
    """Return whether a module is part of torch, of Python or of this package."""
    return is_torch(module_name) or (
        module_name is not None and module_name.partition(".")[0] in sys.stdlib_module_names
    )
