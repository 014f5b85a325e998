"""A snapshot of all that a forward may change, to be put back after runs that leave no trace."""

import ast
import contextlib
import copy
import copyreg
import functools
import itertools
import os
import sys
import types
import warnings
from array import array
from collections import deque
from collections.abc import Collection, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from normswap.graph.class_questions import reachable
from normswap.graph.rows.generators import controls_of, global_controls, is_equal
from normswap.graph.tracing.failure import is_library
from normswap.util.elements import elements_of, holds
from normswap.util.original_class import class_of

# Values that are looked into, the nearest first: what holds more is data, not state.
_MOST = 20_000
_MOST_BYTES = 1 << 24
_MISSING = object()
# Modules of Python with classes of plain objects.
_NAMESPACES = ("types", "argparse", "collections", "queue", "_thread")
# Iterators whose state a copy keeps; from Python 3.14 on those of itertools have none.
_COPYABLE = ("builtins",) if sys.version_info >= (3, 14) else ("builtins", "itertools")


class Snapshot:
    """What is seen from the modules of a model and from the code of their forwards, as it is now.

    Tables, which have names, are put back with what they held: attributes of modules, classes,
    functions and plain objects, slots included, dicts, the environment, variables of functions
    around others, and the globals that forwards and the functions they call name. So are
    collections with their entries, defaults of arguments among them, tensors with their values,
    parameters included, arrays with theirs, and with their states iterators and generators of
    random numbers, those of Python, NumPy and torch included.
    """

    def __init__(self, model: nn.Module) -> None:
        # Holders of names, the names that matter, where not all, and what they mean.
        self._tables: list[tuple[Any, Collection[str] | None, dict[Any, Any]]] = []
        self._collections: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        # Arrays, the index of all they hold, and copies.
        self._arrays: list[tuple[Any, Any, Any]] = []
        self._dice = global_controls()
        self._met: set[int] = set()
        if any(parameter.is_cuda for parameter in model.parameters()):
            self._keep(torch.cuda.default_generators[torch.cuda.current_device()])
        self._keep_table(os.environ)
        level: list[Any] = [*model.parameters(), *model.buffers()]
        level += [part for module in model.modules() for part in self._keep_table(vars(module))]
        classes: set[Any] = {class_of(module) for module in model.modules()}
        for cls in classes:
            if not is_library(cls.__module__):
                level += [part for base in cls.__mro__ for part in self._keep(base)]
                level += [part for f in reachable(cls) for part in self._see(f)]
        hooks = [_global_forward_hooks, _global_forward_pre_hooks]
        for module in model.modules():
            hooks += [module._forward_hooks, module._forward_pre_hooks]
        for hook in itertools.chain.from_iterable(table.values() for table in hooks):
            if (function := function_of(hook)) is not None:
                level += [hook, *self._see(function)]
        while level:
            level = [part for value in level for part in self._keep(value)]
        self._states = [read() for read, _, _ in self._dice]

    def _see(self, function: types.FunctionType) -> list[Any]:
        """Keep what a function names: globals, and variables of functions around it."""
        parts = self._keep(function)
        for cell in function.__closure__ or ():
            parts += self._keep(cell)
        parts += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return parts + self._keep_table(function.__globals__, _names(function.__code__))

    def _keep_table(self, holder: Any, names: Collection[str] | None = None) -> list[Any]:
        kept = {k: _copied(v) for k, v in _table(holder).items() if names is None or k in names}
        self._tables.append((holder, names, kept))
        return list(kept.values())

    def _keep(self, value: Any) -> list[Any]:
        """Keep a value that can change; return what it holds."""
        if (
            id(value) in self._met
            or len(self._met) >= _MOST
            or isinstance(value, nn.Module | types.ModuleType)
        ):
            return []
        self._met.add(id(value))
        if (controls := controls_of(value)) is not None:
            self._dice.append(controls)
        elif isinstance(value, Tensor):
            # With its data, which a forward may exchange: a momentum encoder does.
            self._tensors.append((value, value.data, value.detach().clone()))
        elif isinstance(value, list | set | deque | dict):
            kept = dict(value) if isinstance(value, dict) else [*elements_of(value)]
            self._collections.append((value, kept))
            return [*kept.values()] if isinstance(kept, dict) else kept
        elif isinstance(value, tuple):
            return [*elements_of(value)]
        elif isinstance(value, types.MethodType):
            return [value.__self__]
        elif (whole := _whole_of(value)) is not None:
            self._arrays.append((value, whole, copy.copy(value)))
        elif isinstance(value, types.CellType):
            return self._keep_table(value)
        elif not _is_of_library(value):
            table = value if isinstance(value, type) else getattr(value, "__dict__", None)
            parts = self._keep_table(table) if isinstance(table, dict | type) else []
            return parts + (self._keep_table(value) if _slots_of(value) else [])
        return []

    def restore(self, seed: int | None = None) -> bool:
        """Put everything back.

        Args:
            seed: what generators of random numbers start from instead.

        Returns:
            Whether any of those had moved.
        """
        for holder, names, kept in self._tables:
            _restore_table(holder, names, kept)
        for collection, kept in self._collections:
            if not holds(collection, kept):
                collection.clear()
                (collection.update if hasattr(collection, "update") else collection.extend)(kept)
        for value, whole, kept in self._arrays:
            value[whole] = kept
        with torch.no_grad():
            for tensor, data, values in self._tensors:
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                # Writing counts as a change to what backward saved, so only where there is one.
                if not torch.equal(tensor, values):
                    tensor.copy_(values)
        moved = False
        for (read, write, start), state in zip(self._dice, self._states, strict=True):
            if not is_equal(read(), state):
                moved = True
                write(state)
            if seed is not None:
                start(seed)
        return moved


def function_of(hook: object) -> types.FunctionType | None:
    """Return the Python function that a callable runs, None for code written in C."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not isinstance(hook, types.FunctionType | types.MethodType):
        hook = type(hook).__call__
    function = getattr(hook, "__func__", hook)
    return function if isinstance(function, types.FunctionType) else None


def _whole_of(value: Any) -> Any:
    """Return the index of all of an array that can change, of NumPy or of bytes; None of others."""
    if isinstance(value, bytearray | array):
        return slice(None) if len(value) < _MOST_BYTES else None
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    return ... if value.flags.writeable and value.nbytes < _MOST_BYTES else None


def _slots_of(value: object) -> list[str]:
    names: list[str] = [] if isinstance(value, type) else copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return names


def _is_of_library(value: object) -> bool:
    """Return whether a class, function or object is none of the user's, as a logger or queue."""
    module = getattr(value, "__module__", None)
    return is_library(module) and module not in _NAMESPACES


def _names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _table(holder: Any) -> Any:
    """Return what the names of a dict, class, cell or object with slots mean now."""
    if isinstance(holder, types.CellType):
        return {} if holder == types.CellType() else {"cell_contents": holder.cell_contents}
    if isinstance(holder, type):
        return {name: value for name, value in vars(holder).items() if name[:2] != "__"}
    if isinstance(holder, MutableMapping):
        return holder
    return {name: getattr(holder, name) for name in _slots_of(holder) if hasattr(holder, name)}


def _restore_table(holder: Any, names: Collection[str] | None, kept: dict[Any, Any]) -> None:
    now = _table(holder)
    if names is None and holds(now, kept):
        return
    for name in kept.keys() | (now.keys() if names is None else now.keys() & names):
        value, other = _copied(kept.get(name, _MISSING)), now.get(name, _MISSING)
        if value is other or (isinstance(value, str) and value == other):
            continue
        if not isinstance(holder, MutableMapping):
            delattr(holder, name) if value is _MISSING else setattr(holder, name, value)
        elif value is _MISSING:
            del holder[name]
        else:
            holder[name] = value


def _copied(value: Any) -> Any:
    """Return a copy of an iterator, where one keeps its state; anything else as it is."""
    if type(value) is itertools.count:  # says what it stands at: count(3), or count(3, 2)
        with contextlib.suppress(ValueError, SyntaxError):
            return itertools.count(*ast.literal_eval(f"[{repr(value)[6:-1]}]"))
    iterates = isinstance(value, Iterator) and type(value).__module__ in _COPYABLE
    if not iterates or isinstance(value, types.GeneratorType):
        return value
    with warnings.catch_warnings():  # from Python 3.12 on, that a later one has no such copies
        warnings.simplefilter("ignore", DeprecationWarning)
        return copy.copy(value)
