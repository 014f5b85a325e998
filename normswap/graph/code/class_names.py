"""Read from the code of a function whether it goes by the names of classes.

``type(x).__name__ == "BatchNorm2d"`` asks for a class as ``type(x) is BatchNorm2d`` does.
"""

import dis
import itertools
import types

from normswap.graph.code.bytecode import once_per_code, parts_of, steps_of
from normswap.graph.code.uses import ATTRIBUTE, COMPARES, NAMES, find_asked, instructions_of

# Attributes of a module, or of its forward, that tell its class.
_TELLING = {"__module__", "__doc__", "__func__"}
_SEARCHES = {"startswith", "endswith", "find", "lower", "count", "split"}


@once_per_code
def ways_to_names(code: types.CodeType) -> set[str]:
    """Return how a function takes the class of what is not its first argument, and asks its name.

    A name that is only raised, logged or part of a text for people does not count.

    Returns:
        Of "type", "__class__" and attributes that tell it, those that it does so by.
    """
    own = code.co_varnames[:1] if code.co_argcount else ()
    found, holders, goes_on = set[str](), set[str](), False
    loops = False
    # A class that others are compared with makes no text of them: ``type(key) is str``.
    compared = {*find_asked(list(instructions_of(code)))}
    for part in parts_of(steps_of(code)):
        taken = {way for place in range(len(part)) if (way := _takes(part, place, own))}
        others = taken - {"own"}
        found |= others
        if others or loops:
            # A variable that a class is kept in, or the next of several.
            holders |= {str(s.argval) for s in part if s.opname.startswith("STORE_")}
        loops = bool(others) and part[-1].opname == "FOR_ITER"
        if others or "own" not in taken:
            goes_on |= _goes_on_with_a_name(part, bool(others), holders, compared)
    return found if goes_on else set()


def _takes(part: list[dis.Instruction], place: int, own: tuple[str, ...]) -> str | None:
    """Return how an instruction takes a class, "own" for that of `own`; None if it does not."""
    step, given = part[place], part[place + 1 : place + 3]
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "type":
        is_own = bool(given) and given[0].argval in own and given[-1].opname not in ATTRIBUTE
    elif step.opname in ATTRIBUTE and step.argval == "__class__":
        is_own = place > 0 and part[place - 1].argval in own
    elif step.opname in ATTRIBUTE and place > 0 and _tells(part[place - 1], step):
        is_own = part[place - 1].argval in own
    else:
        return None
    return "own" if is_own else str(step.argval)


def _tells(of: dis.Instruction, step: dis.Instruction) -> bool:
    """Return whether an attribute, of what comes before it, tells the class of a module."""
    return step.argval in _TELLING or (of.argval == "forward" and step.argval in NAMES)


def _goes_on_with_a_name(
    part: list[dis.Instruction], taken: bool, holders: set[str], compared: set[int]
) -> bool:
    """Return whether a statement compares, searches, keeps or returns the name of a class.

    That is one which it takes, or which may be in what it looks the name up on: `holders` are the
    variables of classes, `compared` the offsets of what is only compared with.
    """
    looked_up = {step.argval for step in part if step.opname in ATTRIBUTE}
    attributes = looked_up | {step.argval for step in part if step.argval in NAMES}  # by getattr
    loaded = {step.argval for step in part if step.opname.startswith("LOAD_")}
    texts = {s.argval for s in part if s.offset not in compared} & loaded & {"str", "repr"}
    named = any(
        given.argval in holders or not given.opname.startswith("LOAD_")
        for given, step in itertools.pairwise(part)
        if step.opname in ATTRIBUTE and step.argval in NAMES
    )
    asked = attributes & {*NAMES, *_TELLING} or texts
    if not asked or not (taken or named or (texts and loaded & holders)):
        return False
    tested = attributes & _SEARCHES or any(step.opname in COMPARES for step in part)
    # A name within a longer text is for people to read.
    shown = texts or any(step.opname == "BUILD_STRING" for step in part)
    kept = part[-1].opname.startswith(("STORE_", "RETURN")) and not shown
    return bool(tested or kept)
