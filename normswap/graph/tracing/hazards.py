"""Tests of a symbolic value that Python does not let the value answer for itself.

``y is None`` and ``match y`` compare objects, ``except`` waits for an error that only a real run
raises: a trace would take one branch and never know. While a trace runs, the functions it enters
are watched, and such a test of a value that only a run knows ends the trace.
"""

import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn

from normswap.graph.tracing.origin import is_torch
from normswap.graph.tracing.outline import method_of
from normswap.graph.tracing.patches import TraceFailure

_LOADS = ("LOAD_FAST", "LOAD_DEREF")
_CATCHES = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH")
_ENDS = ("STORE_", "POP_TOP", "JUMP", "RESUME", "FOR_ITER", "POP_JUMP", "GEN_START")
_CATCHING = "catches exceptions"
# Attributes and methods of tensors that may be None.
_OPTIONAL = {"grad", "grad_fn", "get", "pop", "setdefault", "names"}


class Test(NamedTuple):
    """An identity test or a match in a function.

    Attributes:
        names: local variables its operands are made of.
        none: whether it compares with None.
    """

    names: tuple[str, ...]
    none: bool


class Hazards(NamedTuple):
    """What to watch in a function: tests by offset of instruction, and what refuses it at once."""

    tests: dict[int, Test]
    refused: str


@functools.lru_cache(maxsize=4096)
def find_hazards(code: types.CodeType) -> Hazards:
    """Read the instructions of a function."""
    tests: dict[int, Test] = {}
    refused = ""
    names: list[str] = []
    previous: list[dis.Instruction] = []
    for step in dis.get_instructions(code):
        name = step.opname
        to_none = name.endswith(("_IF_NONE", "_IF_NOT_NONE"))
        if name == "IS_OP" or to_none or name.startswith("MATCH_"):
            none = to_none or (bool(previous) and previous[-1].argval is None)
            tests[step.offset] = Test(tuple(names), none and not name.startswith("MATCH_"))
        if name.startswith(_LOADS) and isinstance(step.argval, str | tuple):
            names += [step.argval] if isinstance(step.argval, str) else step.argval
        elif name.startswith(_ENDS) and not name.startswith("STORE_FAST_LOAD"):
            names = []
        bare = bool(previous) and previous[-1].opname == "PUSH_EXC_INFO" and name == "POP_TOP"
        if name in _CATCHES or bare:
            refused = _CATCHING
        elif name == "STORE_GLOBAL":
            refused = "sets a global variable"
        previous.append(step)
    return Hazards(tests, refused)


def _is_apart(code: types.CodeType) -> bool:
    """Return whether a function is given nothing: no symbolic value is in what it tries."""
    given = code.co_argcount + code.co_kwonlyargcount + len(code.co_freevars)
    return not (given or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))


class Watch:
    """Watches the functions that run in this thread while a trace does.

    Args:
        enter: told the globals of each; returns whether they are a forward's own, not a library's.
        names: collects the names they look up.
        root: the container; its methods that run are remembered.
    """

    def __init__(
        self, enter: Callable[[dict[str, Any]], bool], names: set[str], root: nn.Module
    ) -> None:
        self._enter = enter
        self._names = names
        self._root = root
        self._methods: dict[str, tuple[str, ...]] = {}
        self._outer: Any = None

    def methods_naming(self, *names: str) -> list[str]:
        """Return the methods of the container that ran and look up one of these names."""
        return [m for m, used in self._methods.items() if not set(names).isdisjoint(used)]

    def __enter__(self) -> None:
        self._outer = sys.gettrace()
        sys.settrace(self._enter_frame)

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._outer)

    def _enter_frame(
        self, frame: types.FrameType, event: str, arg: Any
    ) -> Callable[..., Any] | None:
        if not self._enter(frame.f_globals):
            return None
        self._names.update(frame.f_code.co_names)
        method = method_of(self._root, frame)
        if method:
            self._methods[method] = frame.f_code.co_names
        hazards = find_hazards(frame.f_code)
        if hazards.refused and not (hazards.refused == _CATCHING and _is_apart(frame.f_code)):
            raise TraceFailure(f"{hazards.refused} inside forward")
        if not hazards.tests:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: types.FrameType, event: str, arg: Any) -> Callable[..., Any]:
        test = find_hazards(frame.f_code).tests.get(frame.f_lasti) if event == "opcode" else None
        if test is not None:
            values = frame.f_locals
            for name in test.names:
                value = values.get(name)
                if isinstance(value, fx.Proxy) and not (test.none and is_something(value.node)):
                    raise TraceFailure(f"tests the identity of {name}, only known when it runs")
        return self._step


def is_something(node: fx.Node) -> bool:
    """Return whether a node's value, and all that is taken from it, is certainly not None."""
    if node.op in ("placeholder", "get_attr"):
        return True
    target = node.target
    base = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_method":
        return target not in _OPTIONAL and base is not None and is_something(base)
    if node.op == "call_module":
        return bool(node.meta.get("something"))
    name = getattr(target, "__name__", "")
    if name == "multi_head_attention_forward":  # its second result may be None
        return False
    if name in ("getitem", "getattr"):
        key = node.args[1] if len(node.args) > 1 else None
        optional = isinstance(key, str) and key in _OPTIONAL  # a slice is no key of a set
        return not optional and base is not None and is_something(base)
    module = getattr(target, "__module__", None) or ""
    if module.startswith("normswap."):  # a method, a checkpointed part: what they return is theirs
        return False
    return is_torch(module) or module in ("_operator", "operator", "math", "builtins", "")
