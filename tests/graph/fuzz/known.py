"""Failures that are known today, by the name of a small program that has each.

An entry is a strict xfail of the tests and excuses random programs that fail alike; it is deleted
once its program is right, and the program stays.
"""

import re
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Known:
    """A kind of failure.

    Attributes:
        reason: what is wrong.
        kind: a pattern of the verdict's kind.
        source: a pattern of the program's text; both have to match.
    """

    reason: str
    kind: str
    source: str = ""

    def covers(self, text: str, kind: str) -> bool:
        """Return whether a program's failure is of this kind."""
        return bool(re.search(self.kind, kind) and re.search(self.source, text))


_FROZEN = "a graph holds a value that the forward would read anew in each run"
_EFFECTS = "a trace, or a graph, leaves out or repeats what a forward does beside its output"
_ROWS = "rows are taken to be in the batch's order"
_PROBED = "measuring rows runs the forward more often than it was called"
_WRAPPED = "a child that was wrapped after conversion"

_VALUE = r"^traced (eval|train|original|threads): (another|gradient)"
_ORDER = r"flip\(0\)|roll\(|arange\(n\d+ - 1|randperm|argsort|new_zeros\(1|new_ones\(n"
_FOLD = r"cat\(|stack\(|repeat|expand|permute|flatten|unflatten|reshape|chunk|split"

KNOWN = {
    "global_class": Known(_FROZEN, _VALUE, r"Change|__call__|print|\.append"),
    "environ": Known(_FROZEN, _VALUE, "environ"),
    "own_call": Known("an own `__call__` runs twice", _VALUE, "__call__"),
    "wrapped": Known(_WRAPPED, "", r"model\.c0 = "),
    "wrapped_summary": Known("raw error for " + _WRAPPED, "summary: raw", r"model\.c0 = "),
    "counter_dict": Known(_EFFECTS, r"^traced conversion: the original was changed"),
    "feature_dict": Known(_EFFECTS, r"^traced \w+: (stray|other|random)"),
    "warn": Known(_EFFECTS, r"^traced conversion: printed"),
    "numpy_random": Known(_EFFECTS, r"^traced conversion: random"),
    "class_counter": Known(
        "`type(self)` is the converted class", r"other state .*K#.calls", r"type\(self\)"
    ),
    "registry": Known("a subclass hook of the user's runs", "KINDS#", "__init_subclass__"),
    "order": Known(_ROWS, r"(eval|threads): another value", _ORDER),
    "probed": Known(_PROBED, r"(untraced|traced) \w+: other (state|lines)", _FOLD),
    "python_random": Known(
        "verification blames a forward that is not repeatable", "names no way out", r"random"
    ),
}


def covering(text: str, kind: str) -> str | None:
    """Return the name of the known failure that a program's failure is, if any."""
    return next((name for name, known in KNOWN.items() if known.covers(text, kind)), None)
