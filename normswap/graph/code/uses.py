"""Read from the code of a function what it asks, and of what."""

import dis
import re
import types
from collections.abc import Iterator, Sequence

COMPARES = {"IS_OP", "COMPARE_OP", "CONTAINS_OP"}
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
# Attributes that tell a class by name.
NAMES = ("__name__", "__qualname__", "__module__")
# Builtins that symbolic values answer themselves; others ask these the same, as functions in C.
ANSWERED = ("isinstance", "hasattr", "getattr")
_ASKING = ("isinstance", "issubclass", "super")
_KINDS = ("LOAD_", "BUILD_TUPLE", "BUILD_SET", "BINARY_OP", "BINARY_OR", "PUSH_NULL")
_MOVES = re.compile("LOAD_FAST|STORE_FAST")
_SAME = {"LOAD_SMALL_INT": "LOAD_CONST"}


def is_written(name: str) -> bool:
    """Return whether code can be written with a name.

    Others are of a tool that rewrote it, as pytest does for assertions, and lead to all it has.
    """
    return not name.startswith("@")


def instructions_of(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield the instructions of a function, as all versions of Python have them.

    One that moves two variables is a move of each, and a small number is a constant. One whose
    argument needs several bytes is where these begin, as a frame that runs it says. Left out are
    those by which Python 3.14 asks whether ``all``, ``any`` or ``tuple`` is its own.
    """
    start = None
    steps = list(dis.get_instructions(code))
    asked = [i for i, step in enumerate(steps) if step.opname == "LOAD_COMMON_CONSTANT"]
    own = {i + k for i in asked if steps[i + 1].opname == "IS_OP" for k in (-1, 0, 1, 2)}
    for place, step in enumerate(steps):
        start = step.offset if start is None else start
        if step.opname == "EXTENDED_ARG":
            continue
        if place in own:
            start = None
            continue
        names = _MOVES.findall(step.opname) or [_SAME.get(step.opname, step.opname)]
        values = step.argval if len(names) > 1 else [step.argval]
        for name, value in zip(names, values, strict=True):
            yield step._replace(opname=name, opcode=dis.opmap[name], argval=value, offset=start)
        start = None


def find_asked(steps: Sequence[dis.Instruction]) -> Iterator[int]:
    """Yield the offsets of loads that only say with what class something is compared."""
    for place, step in enumerate(steps):
        if step.opname in COMPARES:
            second = _start(steps, place)
            parts = [(second, place), (_start(steps, second), second)]
        elif step.opname.startswith("CALL") and step.arg == 2:
            end = place - (steps[place - 1].opname == "PRECALL")
            second = _start(steps, end)
            first = _start(steps, second)
            asks = first > 0 and steps[first - 1].argval in _ASKING
            of = steps[first - 1].argval if asks else ""
            parts = [(first, second) if of == "super" else (second, end)] if asks else []
        elif step.opname.startswith("CHECK_EXC"):
            parts = [(_start(steps, place), place)]
        elif step.opname == "LOAD_SUPER_ATTR":
            end = _start(steps, place)
            parts = [(_start(steps, end), end)]
        else:
            continue
        for first, last in parts:
            found = steps[first:last]
            if all(s.opname.startswith(_KINDS) for s in found):
                yield from (s.offset for s in found)


def find_answered(steps: Sequence[dis.Instruction]) -> dict[int, int]:
    """Return the offset of each call of a builtin in `ANSWERED`, and of the load of its name."""
    found = {}
    for place, step in enumerate(steps):
        if step.opname.startswith("CALL") and step.arg is not None:
            first = end = place - (steps[place - 1].opname == "PRECALL")
            for _ in range(step.arg):
                first = _start(steps, first)
            if first > 0 and steps[first - 1].argval in ANSWERED:
                # Python 3.11 may call from either.
                found[step.offset] = found[steps[end].offset] = steps[first - 1].offset
    return found


def _start(steps: Sequence[dis.Instruction], end: int) -> int:
    """Return where the expression begins whose value is on top of the stack before a step."""
    missing = 1
    while missing > 0 and end > 0:
        end -= 1
        step = steps[end]
        if step.opname.startswith(("JUMP", "POP_JUMP", "FOR_ITER", "SEND")):
            return 0
        missing -= dis.stack_effect(step.opcode, step.arg)
    return end
