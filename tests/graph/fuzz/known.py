"""Failures that are known today: strict xfails of the tests, each deleted once it is right.

Constructs that fail alone are left out of random programs. What only fails together has a small
program in the folder `programs`, and excuses random programs that fail alike.
"""

import re
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"

_FROZEN = "a graph holds a value that the forward would read anew in each run"
_MEASURED = "measuring rows runs the forward, and what it does beside its output, several times"

_BY_REASON = {
    _FROZEN: "callable_attribute method_patched_forward if_hasattr string",
    _MEASURED: """
        print warn log logging feature_list feature_dict feature_deque counter_global counter_class
        counter_dict counter_function counter_closure counter_iterator environ_set checkpoint_old
    """,
    "a graph takes a child's output to be something": "child_none_out",
    "a graph does not see what a child does to an object": "child_dataclass_changed",
    "a hook of the user's sees the context": "hook_kwargs",
    "a forward set on the instance after conversion is passed the context": "instance_forward",
    "a graph asks for as many chunks as it was traced with": "chunks",
}
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


KNOWN = {
    "chunk_of_one": Known(
        "a graph asks for as many chunks as it was traced with", "expected # parts", "chunk"
    ),
    "probed_effect": Known(_MEASURED, "other (state|lines)", "SEEN|print|append"),
}


def covering(text: str, kind: str) -> str | None:
    """Return the name of the known failure that a program's failure is, if any."""
    for name, known in KNOWN.items():
        if re.search(known.kind, kind) and re.search(known.source, text):
            return name
    return None
