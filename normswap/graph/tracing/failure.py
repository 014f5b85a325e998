"""Why no graph stands for a forward, and whose code is whose."""

import dis
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


def is_library(module_name: str | None) -> bool:
    """Return whether a module is part of torch, of Python or of this package."""
    if module_name is None:
        return False
    # What makes a named tuple is code of the standard library under a name of its own.
    standard = module_name.partition(".")[0] in sys.stdlib_module_names
    return standard or module_name.startswith("namedtuple_") or is_torch(module_name)


def in_words(error: Exception) -> str:
    """Return why a trace ended, as the rest of a sentence that begins with the forward."""
    text, name = (
        re.sub(r"Proxy\(\w+\)", "...", " ".join(str(error).split()))[:120],
        type(error).__name__,
    )
    if isinstance(error, TraceFailure):
        return " ".join(str(error).split())
    if isinstance(error, TypeError) and "as an integer" in text:
        return "counts, or picks, by a number that is known only when it runs"
    if isinstance(error, TypeError) and "'Value'" in text:
        return "needs, as a plain Python value, one that is known only when it runs"
    if is_raised(error):
        return f"raises {name} where its arguments have no values yet: {text}"
    step = _last_step(error, outside=True)
    code = (
        "" if step is None else linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno)
    )
    where = f" at `{code.strip()[:80]}`" if code.strip() else ""
    return f"fails{where} on stand-ins for its arguments, which have no values ({name}: {text})"


def is_raised(error: BaseException) -> bool:
    """Return whether a forward raised an error itself, rather than torch or Python for it."""
    step = _last_step(error)
    if step is None or is_library(step.tb_frame.f_globals.get("__name__")):
        return False
    return dis.opname[step.tb_frame.f_code.co_code[step.tb_lasti]] == "RAISE_VARARGS"


def _last_step(error: BaseException, outside: bool = False) -> types.TracebackType | None:
    """Return where an error was raised, or where the code of a user last was on the way there."""
    step, found = error.__traceback__, None
    while step is not None:
        if not (outside and is_library(step.tb_frame.f_globals.get("__name__"))):
            found = step
        step = step.tb_next
    return found
