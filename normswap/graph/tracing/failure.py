"""Why no graph stands for a forward, in words."""

import linecache
import re
import types

from normswap.graph.code.library import is_library


class TraceFailure(Exception):
    """A forward that no graph stands for; the container keeps its own.

    The text is the reason, as the rest of a sentence that begins with the forward.
    """


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
