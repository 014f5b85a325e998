"""Failures that are known today: strict xfails of the tests, each deleted once it is right.

Constructs that fail alone are left out of random programs. What only fails together has a small
program in the folder `programs`, and excuses random programs that fail alike.
"""

import re
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"

_BY_REASON: dict[str, str] = {}
CONSTRUCTS_KNOWN = {name: why for why, names in _BY_REASON.items() for name in names.split()}


@dataclass(frozen=True)
class Known:
    """A failure of several things together.

    Attributes:
        reason: what is wrong.
        kind: a pattern of the failure's kind.
        source: a pattern of the program's text; both have to match.
    """

    reason: str
    kind: str
    source: str


KNOWN: dict[str, Known] = {}


def covering(text: str, kind: str) -> str | None:
    """Return the name of the known failure that a program's failure is, if any."""
    for name, known in KNOWN.items():
        if re.search(known.kind, kind) and re.search(known.source, text):
            return name
    return None
