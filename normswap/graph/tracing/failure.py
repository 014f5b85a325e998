"""Why no graph stands for a forward, and whose code is whose."""

import sys
from collections.abc import Iterable


class TraceFailure(Exception):
    """A forward that no graph stands for; the container keeps its own. The text is the reason.

    Args:
        reason: why, as the rest of a sentence that begins with the forward.
        methods: of the container, in one of which it came about; innermost first.
    """

    def __init__(self, reason: str, methods: Iterable[str] = ()) -> None:
        super().__init__(reason)
        self.methods = tuple(methods)


def is_torch(module_name: str | None) -> bool:
    """Return whether a module is part of torch itself, or of this package."""
    return module_name is not None and (
        module_name == "torch" or module_name.startswith(("torch.", "normswap."))
    )


def is_library(module_name: str | None) -> bool:
    """Return whether a module is part of torch, of Python or of this package."""
    if module_name is None:
        return False
    # What makes a named tuple is code of the standard library under a name of its own.
    standard = module_name.partition(".")[0] in sys.stdlib_module_names
    return standard or module_name.startswith("namedtuple_") or is_torch(module_name)
