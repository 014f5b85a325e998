"""Read from the code of a function what it takes from outside, and what it asks of its values."""

import dis
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from normswap.graph.code.uses import (
    ANSWERED,
    ATTRIBUTE,
    find_answered,
    find_asked,
    instructions_of,
)

_SKIPPED = ("PRECALL", "NOP", "NOT_TAKEN", "PUSH_NULL")
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_FREE = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_STORES_OUTSIDE = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF")
_CATCHES = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH")
# Attributes by which a function, a class or a method is taken apart.
_INSIDE = (
    "__class__ __dict__ __code__ __defaults__ __kwdefaults__ __globals__ __closure__ __wrapped__ "
    "__func__ __self__ __qualname__ __module__ __doc__ __mro__ __bases__ __subclasses__ __args__"
).split()
_ENDS = ("STORE_", "POP_TOP", "POP_JUMP", "JUMP", "FOR_ITER", "RETURN", "RAISE", "RESUME")


class Load(NamedTuple):
    """A name that a function loads from outside of it.

    Attributes:
        name: of a global, a builtin or a free variable.
        free: whether it is a free variable.
        chain: attributes looked up on it at once, as in ``settings.model.width``; for ``super``,
            what is looked up on what it returns.
        asks: whether something is only compared with the class that it leads to.
    """

    name: str
    free: bool
    chain: tuple[str, ...]
    asks: bool


class Test(NamedTuple):
    """An identity test or a match, which Python does not let a value answer for itself.

    Attributes:
        names: local variables its operands are made of.
        none: whether it compares with None.
        calls: whether something is called for one of its operands.
    """

    names: tuple[str, ...]
    none: bool
    calls: bool


class Statement(NamedTuple):
    """A statement, or part of one: what it loads from outside, looks up on anything, and does."""

    loads: list[Load]
    attributes: set[str]
    operations: set[str]


class Code(NamedTuple):
    """What a function does that matters to a trace, by offset of the instruction.

    Attributes:
        loads: of names from outside.
        tests: of identity.
        answered: calls by which symbolic values are asked, with the loads of what they call.
        refused: what may not run, and what it would do.
        catches: whether it handles exceptions.
        statements: in order.
    """

    loads: dict[int, Load]
    tests: dict[int, Test]
    answered: dict[int, int]
    refused: dict[int, str]
    catches: bool
    statements: list[Statement]


_Found = TypeVar("_Found")


def once_per_code(read: Callable[[types.CodeType], _Found]) -> Callable[[types.CodeType], _Found]:
    """Return a function that reads code as another does, each code once as long as it lives."""
    found: weakref.WeakKeyDictionary[types.CodeType, _Found] = weakref.WeakKeyDictionary()

    @functools.wraps(read)
    def look_up(code: types.CodeType) -> _Found:
        if code not in found:
            found[code] = read(code)
        return found[code]

    return look_up


@once_per_code
def read_code(code: types.CodeType) -> Code:
    """Read the instructions of a function."""
    every = list(instructions_of(code))
    steps = [step for step in every if step.opname not in _SKIPPED]
    answered = find_answered(every)
    loads = _find_loads(code, steps, {*find_asked(every)})
    refused = _find_refused(code, steps, {*answered.values()})
    statements = list(_split(steps, loads))
    return Code(loads, _find_tests(steps), answered, refused, _catches(steps), statements)


def steps_of(code: types.CodeType) -> list[dis.Instruction]:
    """Return the instructions of a function that do something."""
    return [step for step in instructions_of(code) if step.opname not in _SKIPPED]


def returns_nothing(code: types.CodeType) -> bool:
    """Return whether a function can only return None."""
    pairs = itertools.pairwise([None, *steps_of(code)])
    ends = [(a, b) for a, b in pairs if b is not None and "RETURN" in b.opname]
    # What is jumped to returns one value of several: x if c else None.
    last = [b if b.opname == "RETURN_CONST" else None if b.is_jump_target else a for a, b in ends]
    return all(c is not None and "CONST" in c.opname and c.argval is None for c in last)


def closure_of(function: types.FunctionType) -> dict[str, object]:
    """Return what a function's free variables hold, where they hold something."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function, and of the functions it makes."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_of(part)


def _split(steps: list[dis.Instruction], loads: dict[int, Load]) -> Iterator[Statement]:
    for part in parts_of(steps):
        yield Statement(
            [loads[s.offset] for s in part if s.offset in loads],
            {str(s.argval) for s in part if s.opname in ATTRIBUTE},
            {s.argrepr if s.opname == "BINARY_OP" else s.opname for s in part},
        )


def parts_of(steps: list[dis.Instruction]) -> Iterator[list[dis.Instruction]]:
    """Yield the instructions of each statement, or part of one."""
    start = 0
    for end, step in enumerate(steps, 1):
        if step.opname.startswith(_ENDS):
            yield steps[start:end]
            start = end


def _find_loads(
    code: types.CodeType, steps: list[dis.Instruction], asked: set[int]
) -> dict[int, Load]:
    loads = {}
    for place, step in enumerate(steps):
        free = step.opname in _FREE and step.argval in code.co_freevars
        if not free and step.opname not in _GLOBAL:
            continue
        if step.argval == "super":
            loads[step.offset] = Load("super", free, _find_inherited(steps[place:]), False)
            continue
        end = place + 1
        while end < len(steps) and steps[end].opname in ATTRIBUTE:
            end += 1
        chain = tuple(str(s.argval) for s in steps[place + 1 : end])
        loads[step.offset] = Load(str(step.argval), free, chain, step.offset in asked)
    return loads


def _find_inherited(steps: list[dis.Instruction]) -> tuple[str, ...]:
    """Return the name that is looked up on ``super()``, where these steps start."""
    for before, step in itertools.pairwise(steps):
        if step.opname.startswith("LOAD_SUPER") or (
            step.opname in ATTRIBUTE and before.opname.startswith("CALL")
        ):
            return (str(step.argval),)
    return ()


def _find_tests(steps: list[dis.Instruction]) -> dict[int, Test]:
    tests = {}
    names: list[str] = []
    calls = False
    before, constant = "", object()
    for step in steps:
        name = step.opname
        to_none = name.endswith(("_IF_NONE", "_IF_NOT_NONE"))
        if name == "IS_OP" or to_none or name.startswith("MATCH_"):
            none = (to_none or constant is None) and not name.startswith("MATCH_")
            tests[step.offset] = Test(tuple(names), none, calls)
        named = before.startswith(("COPY", "DUP_TOP")) and name.startswith("STORE_")  # y := x
        if named or name.startswith(("LOAD_FAST", "LOAD_DEREF")):
            names.append(step.argval)
        elif name.startswith(_ENDS) and not name.startswith("JUMP"):  # x if c else y
            names, calls = [], False
        calls |= name.startswith("CALL")
        before, constant = name, step.argval if name.startswith("LOAD_CONST") else ...
    return tests


def _find_refused(
    code: types.CodeType, steps: list[dis.Instruction], called: set[int]
) -> dict[int, str]:
    refused = {}
    for step in steps:
        name, given = step.opname, step.argval
        if name in _STORES_OUTSIDE and given not in code.co_cellvars:
            refused[step.offset] = f"sets {given} outside of it"
        elif name in ("STORE_ATTR", "DELETE_ATTR"):
            refused[step.offset] = f"sets .{given} inside forward"
        elif name in _GLOBAL and given in ANSWERED and step.offset not in called:
            refused[step.offset] = f"hands on {given}"
        elif name == "IMPORT_NAME":
            refused[step.offset] = f"imports {given}"
        elif name in ATTRIBUTE and given in _INSIDE:
            refused[step.offset] = f"looks into .{given}"
    return refused


def _catches(steps: list[dis.Instruction]) -> bool:
    pairs = itertools.pairwise(steps)
    bare = any(a.opname == "PUSH_EXC_INFO" and b.opname == "POP_TOP" for a, b in pairs)
    return bare or any(step.opname in _CATCHES for step in steps)
