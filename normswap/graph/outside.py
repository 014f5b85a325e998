"""What a model's forward can change outside of the model: put back after runs on the side."""

import io
import logging
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from torch import nn

from normswap.graph.class_questions import reachable
from normswap.graph.tracing import is_library
from normswap.util.looks import class_of

_MISSING = object()


class Slot(NamedTuple):
    """A name outside of a model: how to read what it means, and to give it another meaning."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]


def find_slots(module: nn.Module) -> Iterator[Slot]:
    """Yield what forwards below a module may give another meaning.

    These are the globals that they and the functions they call name, variables of functions around
    those, attributes of functions, and attributes of their classes.
    """
    met: set[tuple[int, str]] = set()
    for cls, now in {(class_of(m), type(m)) for m in module.modules()}:
        if is_library(cls.__module__):
            continue
        bases = [base for base in cls.__mro__ if not is_library(base.__module__)]
        names = {name for base in bases for name in vars(base) if name[:2] != "__"}
        for base in {*bases, now}:
            yield from (Slot(*_of_class(base, name)) for name in names if _is_new(met, base, name))
        for function in reachable(cls.forward, cls):  # type: ignore[attr-defined]
            for name in _names(function.__code__):
                if name in function.__globals__ and _is_new(met, function.__globals__, name):
                    yield Slot(*_of_table(function.__globals__, name))
            for name in vars(function):
                yield Slot(*_of_table(vars(function), name))
            for cell in function.__closure__ or ():
                if cell != types.CellType() and _is_new(met, cell, ""):
                    yield Slot(*_of_cell(cell))


def _is_new(met: set[tuple[int, str]], holder: Any, name: str) -> bool:
    key = (id(holder), name)
    return key not in met and not met.add(key)  # type: ignore[func-returns-value]


def _names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _of_class(cls: type, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    def write(value: Any) -> None:
        delattr(cls, name) if value is _MISSING else setattr(cls, name, value)

    return lambda: vars(cls).get(name, _MISSING), write


def _of_table(table: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: table.get(name), lambda value: table.__setitem__(name, value)


def _of_cell(cell: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: cell.cell_contents, lambda value: setattr(cell, "cell_contents", value)


class _Silent(io.TextIOBase):
    """Drops what one thread writes; others write to where they did."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        here = threading.get_ident() == self._thread
        return len(text) if here or self._stream is None else self._stream.write(text)


@contextmanager
def silence() -> Iterator[None]:
    """Drop what this thread prints, logs and warns of; put the environment back."""
    thread, environment = threading.get_ident(), dict(os.environ)
    handle = logging.Logger.handle

    def handle_others(logger: logging.Logger, record: logging.LogRecord) -> None:
        if threading.get_ident() != thread:
            handle(logger, record)

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(_Silent(sys.stdout)))
        stack.enter_context(redirect_stderr(_Silent(sys.stderr)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.Logger.handle = handle_others  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            logging.Logger.handle = handle  # type: ignore[method-assign]
            if dict(os.environ) != environment:
                os.environ.clear()
                os.environ.update(environment)
