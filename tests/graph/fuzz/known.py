"""Failures that are known today: strict xfails of the tests, each deleted once it is right.

Constructs that fail alone are left out of random programs. What only fails together has a small
program in the folder `programs`, and excuses random programs that fail alike.
"""

import re
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"

_FROZEN = "a graph holds a value that the forward would read anew in each run"
_EFFECTS = "conversion or a graph repeats or leaves out what a forward does beside its output"
_TYPES = "a norm or a block answers another type, class or attribute than it had"
_ROWS = "rows are taken to be in the batch's order"

_BY_REASON = {
    _FROZEN: """
        global_constant global_flag global_dict global_nested global_list global_loop global_object
        global_class global_function global_lambda global_counter_read closure_class
        class_attribute_typed static_method class_method method method_patched_forward partial
        environ environ_set counter_iterator if_hasattr string
    """,
    _EFFECTS: """
        print_if warn logging log feature_list feature_dict feature_deque item_list counter_dict
        counter_function counter_closure lru_cache_constant noise_seeded noise_numpy
        child_dataclass_changed
    """,
    _TYPES: """
        if_child_type if_norm_type if_norm_class if_any_norm if_norm_affine counter_class
        child_none_out child_generator
    """,
    _ROWS: "fold_flip fold_roll fold_order fold_random_order fold_sort",
    "a subclass hook of the user's runs": "subclass_registry",
    "a hook of the user's sees the context": "hook_kwargs",
    "a forward set on the instance after conversion is passed the context": "instance_forward",
    "an own `__call__` runs twice": "own_call",
    "the summary looks for a norm that is no longer there": "if_none_child",
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


_FOLDED = r"cat\(|stack\(|repeat|expand|permute|flatten|unflatten|reshape|chunk|split|interpolate"
KNOWN = {
    "wrapped": Known("a child wrapped after conversion gets no labels", "", r"model\.c0 = "),
    "wrapped_summary": Known(
        "the summary looks for a norm that is no longer there", "summary: raw", r"model\.c0 = "
    ),
    "probed_effect": Known(
        "measuring rows runs the forward more often than it was called", "other|stray", _FOLDED
    ),
    "verified_random": Known(
        "verification blames a forward that draws Python or NumPy numbers",
        "names no way out",
        r"random\.",
    ),
}


def covering(text: str, kind: str) -> str | None:
    """Return the name of the known failure that a program's failure is, if any."""
    for name, known in KNOWN.items():
        if re.search(known.kind, kind) and re.search(known.source, text):
            return name
    return None
