"""Why no graph stands for a forward, and whose code is whose."""

import functools
import linecache
import re
import sys
import types


class TraceFailure(Exception):
    """A forward that no graph stands for; the container keeps its own.

    The text is the reason, as the rest of a sentence that begins with the forward.
    """


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


def in_words(error: Exception) -> str:
    """Return why a trace ended, as the rest of a sentence that begins with the forward."""
    text = " ".join(str(error).split())
    if isinstance(error, TraceFailure):
        return text
    text = re.sub(r"Proxy\(\w+\)", "...", text)[:120]
    step = _last_step(error)
    code = linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno) if step else ""
    where = f" at `{code.strip()[:80]}`" if code.strip() else ""
    kind = type(error).__name__
    return f"fails{where} on stand-ins for its arguments, which have no values ({kind}: {text})"


def _last_step(error: BaseException) -> types.TracebackType | None:
    """Return where the code of a user last was on the way to an error."""
    step, found = error.__traceback__, None
    while step is not None:
        if not is_library(step.tb_frame.f_globals.get("__name__")):
            found = step
        step = step.tb_next
    return found
