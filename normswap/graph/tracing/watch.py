"""Watch the functions that run while a forward is traced: refuse before what may not run does."""

import builtins
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from normswap.graph.code.bytecode import Load, Test, read_code
from normswap.graph.code.library import is_library, is_torch
from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.reads import Reads
from normswap.graph.tracing.symbol import is_given
from normswap.graph.tracing.value_kinds import symbolic_parts
from normswap.graph.tracing.whitelist import cannot_change, needs_guard, why_unfit

_MISSING = object()


class Watch:
    """Watches the functions that run in this thread while a trace does.

    Args:
        reads: collects what they read.
    """

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._refused: dict[types.CodeType, dict[int, str]] = {}
        self._outer: Any = None
        self._start: types.FrameType | None = None

    def __enter__(self) -> None:
        self._outer, self._start = sys.gettrace(), sys._getframe(1)
        # Python 3.12 tells of instructions only after a frame had asked before it was traced.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._enter_frame)

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._outer)
        self._start = None

    def _enter_frame(
        self, frame: types.FrameType, event: str, arg: object
    ) -> Callable[..., Any] | None:
        if is_library(frame.f_globals.get("__name__")):
            return None
        self._note_method(frame)
        code = read_code(frame.f_code)
        if code.catches and not _is_given_nothing(frame.f_code):
            raise TraceFailure("handles exceptions, which only a run raises")
        self._check_arguments(frame)
        refused = self._refused.get(frame.f_code)
        if refused is None or frame.f_code.co_freevars:
            found = {at: self._judge(frame, load) for at, load in code.loads.items()}
            refused = {at: why for at, why in found.items() if why} | code.refused
            self._refused[frame.f_code] = refused
        if not refused and not code.tests:
            return None
        stops = refused

        def step(frame: types.FrameType, event: str, arg: object) -> Callable[..., Any]:
            if event == "opcode":
                if frame.f_lasti in stops:
                    raise TraceFailure(stops[frame.f_lasti])
                test = code.tests.get(frame.f_lasti)
                if test is not None:
                    _check_test(test, frame.f_locals)
            return step

        # Python 3.13 tells of instructions only where a frame is traced when it asks.
        frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = step, True, False
        return step

    def _note_method(self, frame: types.FrameType) -> None:
        """Note which function a class has where it is called by ``super()`` or by itself."""
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        for cls in type(first).__mro__ if isinstance(first, nn.Module) else ():
            found = vars(cls).get(code.co_name)
            if getattr(found, "__code__", None) is code:
                self._reads.name(cls, code.co_name, found)

    def _check_arguments(self, frame: types.FrameType) -> None:
        """Raise where a function is given a class, whose attributes its code could read."""
        code = frame.f_code
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value = frame.f_locals.get(name)
            if isinstance(value, type) and not cannot_change(value):
                raise TraceFailure(f"hands the class {value.__name__} to {code.co_name}")

    def _judge(self, frame: types.FrameType, load: Load) -> str:
        """Return why a name may not be read; note what it means where that may change."""
        try:
            return (self._why_unfit_cell if load.free else self._why_unfit)(frame, load)
        except TraceFailure as failure:  # it may never be read
            return str(failure)

    def _why_unfit(self, frame: types.FrameType, load: Load) -> str:
        """Return why a global or a builtin may not be read."""
        table = frame.f_globals if load.name in frame.f_globals else frame.f_builtins
        if load.name not in table:
            return ""  # an error of the forward's own
        value = table[load.name]
        if table is frame.f_builtins:  # until a global takes the name
            self._reads.name(frame.f_globals, load.name, None)
            self._reads.name(table, load.name, value, of_library=True)
        if table is frame.f_builtins or value is getattr(builtins, load.name, _MISSING):
            if value is type:
                return "asks for the type of a value"
            if value is super:
                return self._why_unfit_inherited(frame, load)
            inner = next((name for name in load.chain if name.startswith("__")), None)
            return f"goes by {load.name}.{inner}" if inner else why_unfit(value, load.name)
        return self._why_unfit_chain(load, table, value)

    def _why_unfit_chain(self, load: Load, table: object, value: Any) -> str:
        """Return why what a name and its attributes lead to may not be read; note each step."""
        steps = [(table, key := load.name, value)]
        for name in load.chain:
            if not isinstance(value, types.ModuleType | type):
                break
            if isinstance(value, type) and is_torch(value.__module__):
                break
            holder, key, value = value, name, getattr(value, name, _MISSING)
            if value is _MISSING or isinstance(value, property):
                return ""
            steps.append((holder, key, value))
        where = ".".join((load.name, *load.chain)[: len(steps)])
        why = why_unfit(value, where, load.asks)
        if why:
            return why
        of_library = not needs_guard(value, [owner for owner, _, _ in steps])
        for owner, key, value in steps:
            table = vars(owner) if isinstance(owner, types.ModuleType) else owner
            self._reads.name(table, key, value, of_library)
        return ""

    def _why_unfit_inherited(self, frame: types.FrameType, load: Load) -> str:
        """Return why what ``super()`` finds may not be read; note what it is."""
        code, own = frame.f_code, frame.f_locals.get("__class__")
        order = type(frame.f_locals.get(code.co_varnames[0])).__mro__ if code.co_varnames else ()
        if own not in order or not load.chain:
            return "uses super() of another class than its own"
        name = load.chain[0]
        later = order[order.index(own) + 1 :]
        base = next((base for base in later if name in vars(base)), None)
        if base is None or is_library(base.__module__):
            return ""
        self._reads.name(base, name, getattr(base, name))
        kinds = (types.FunctionType, classmethod, staticmethod)
        return "" if isinstance(vars(base)[name], kinds) else why_unfit(vars(base)[name], name)

    def _why_unfit_cell(self, frame: types.FrameType, load: Load) -> str:
        """Return why a variable of an enclosing function may not be read."""
        value = frame.f_locals.get(load.name, _MISSING)
        if value is _MISSING:
            return ""
        if load.name == "__class__":
            return self._why_unfit_chain(load, {load.name: value}, value)
        outer = frame.f_back
        while outer is not None and outer is not self._start:
            if load.name in outer.f_code.co_cellvars and outer.f_locals.get(load.name) is value:
                return ""  # a variable of this forward
            outer = outer.f_back
        return f"reads {load.name}, a variable of a function that made it"


def _check_test(test: Test, values: Mapping[str, object]) -> None:
    """Raise where only a run knows the answer."""
    for name in test.names:
        found = symbolic_parts(values.get(name))
        certain = test.none and not test.calls and all(is_given(p.node) for p in found)
        if found and not certain:
            what = "is None" if test.none else "is another object"
            via = f"what comes of {name}" if test.calls else name
            raise TraceFailure(f"asks whether {via} {what}, known only when it runs")


def _is_given_nothing(code: types.CodeType) -> bool:
    """Return whether no symbolic value can be in what a function tries, as in smp's models."""
    given = code.co_argcount + code.co_kwonlyargcount + len(code.co_freevars)
    return not (given or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))
