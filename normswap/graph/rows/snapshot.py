"""A snapshot of all that a forward may change, to be put back after runs that leave no trace."""

import ast
import contextlib
import copy
import itertools
import os
import sys
import types
import warnings
from collections import deque
from collections.abc import Collection, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from normswap.graph.code.library import is_library
from normswap.graph.rows.generators import controls_of, global_controls, is_equal
from normswap.graph.rows.reached import behind, is_of_library, names_in, whole_of
from normswap.util.elements import contents_of, elements_of, holds, refill, slots_of
from normswap.util.original_class import class_of

# Values that are looked into, the nearest first: what holds more is data, not state.
_MOST = 20_000
_MISSING = object()
_METHODS = (types.FunctionType, classmethod, staticmethod, property)
# Iterators whose state a copy keeps; from Python 3.14 on those of itertools have none.
_COPYABLE = ("builtins",) if sys.version_info >= (3, 14) else ("builtins", "itertools")


class Snapshot:
    """What is seen from the modules of a model and from the code of their forwards, as it is now.

    Tables, which have names, are put back with what they held: attributes of modules, classes,
    functions and plain objects, slots included, dicts, the environment, variables of functions
    around others, and the globals that code names: of forwards, and of the functions and methods
    that these lead to by name, attribute or collection, in files of the user's, too. So are
    collections with their entries, defaults of arguments among them, tensors with their values,
    parameters included, arrays with theirs, and with their states iterators and generators of
    random numbers, those of Python, NumPy and torch included.
    """

    def __init__(self, model: nn.Module) -> None:
        # Holders of names, the names that matter, where not all, what they mean, and in a list.
        self._tables: list[tuple[Any, Collection[str] | None, dict[Any, Any], list[Any]]] = []
        self._collections: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        # Arrays, the index of all they hold, and copies.
        self._arrays: list[tuple[Any, Any, Any]] = []
        self._dice = global_controls()
        self._met: set[int] = set()
        # What code that was seen calls things, and classes with methods of such names.
        self._named = {"forward"}
        self._classes: list[type] = []
        if any(parameter.is_cuda for parameter in model.parameters()):
            self._keep(torch.cuda.default_generators[torch.cuda.current_device()])
        self._keep_table(os.environ)
        level: list[Any] = [*model.parameters(), *model.buffers()]
        hooks = [_global_forward_hooks, _global_forward_pre_hooks]
        for module in model.modules():
            level += [class_of(module), *self._keep_table(vars(module))]
            hooks += [module._forward_hooks, module._forward_pre_hooks]
        level += itertools.chain.from_iterable(table.values() for table in hooks)
        while level := [*self._methods(), *level]:
            level = [part for value in level for part in self._keep(value)]
        self._states = [read() for read, _, _ in self._dice]

    def _methods(self) -> list[Any]:
        """Return what classes have under names in code that was seen, and what operators call."""
        if len(self._met) >= _MOST:
            return []
        tables = [vars(cls) for cls in self._classes]
        found = [v for t in tables for name, v in t.items() if self._is_called(name)]
        return [value for value in found if id(value) not in self._met]

    def _is_called(self, name: str) -> bool:
        return name in self._named or (name[:2] == "__" and name != "__init__")

    def _see(self, function: types.FunctionType) -> list[Any]:
        """Keep what a function names: globals, and variables of functions around it."""
        parts: list[Any] = [function.__dict__, function.__defaults__, function.__kwdefaults__]
        parts += function.__closure__ or ()
        if not is_library(function.__globals__.get("__name__")):
            names = names_in(function.__code__)
            self._named |= names
            parts += self._keep_named(function.__globals__, names)
        return parts

    def _keep_named(self, table: dict[str, Any], names: set[str]) -> list[Any]:
        """Keep what names mean in a module, and in modules that they lead to."""
        parts, tables = list[Any](), [table]
        for each in tables:
            parts += (found := self._keep_table(each, names))
            files = [vars(p) for p in found if isinstance(p, types.ModuleType)]
            met = set(map(id, tables))
            tables += [f for f in files if id(f) not in met and not is_library(f["__name__"])]
        return parts

    def _keep_table(self, holder: Any, names: Collection[str] | None = None) -> list[Any]:
        kept = {k: _copied(v) for k, v in _table(holder).items() if names is None or k in names}
        self._tables.append((holder, names, kept, contents_of(kept)))
        return list(kept.values())

    def _keep(self, value: Any) -> list[Any]:
        """Keep a value that can change; return what it holds."""
        if id(value) in self._met or len(self._met) >= _MOST:
            return []
        self._met.add(id(value))
        if isinstance(value, nn.Module | types.ModuleType):
            return []
        if (controls := controls_of(value)) is not None:
            self._dice.append(controls)
        elif isinstance(value, Tensor):
            # With its data, which a forward may exchange: a momentum encoder does.
            self._tensors.append((value, value.data, value.detach().clone()))
        elif isinstance(value, list | set | deque | dict):
            self._collections.append((value, contents_of(value)))
            return [*elements_of(value)]
        elif isinstance(value, tuple | frozenset):
            return [*elements_of(value)]
        elif (whole := whole_of(value)) is not None:
            self._arrays.append((value, whole, copy.copy(value)))
        elif isinstance(value, types.CellType):
            return self._keep_table(value)
        elif isinstance(value, types.FunctionType):
            return self._see(value)
        elif (led := behind(value)) is not None:
            return led
        elif not is_of_library(value):
            return self._keep_object(value)
        return []

    def _keep_object(self, value: Any) -> list[Any]:
        """Keep the attributes of an object, or of a class."""
        if isinstance(value, type):
            self._classes.append(value)
            parts = self._keep_table(value)
            return [*value.__bases__, *(p for p in parts if not isinstance(p, _METHODS))]
        table = getattr(value, "__dict__", None)
        parts = self._keep_table(table) if isinstance(table, dict) else []
        return [type(value), *parts, *(self._keep_table(value) if slots_of(value) else [])]

    def restore(self, seed: int | None = None) -> bool:
        """Put everything back.

        Args:
            seed: what generators of random numbers start from instead.

        Returns:
            Whether any of those had moved.
        """
        for table in self._tables:
            _restore_table(*table)
        for collection, contents in self._collections:
            if not holds(collection, contents):
                refill(collection, contents)
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


def _table(holder: Any) -> Any:
    """Return what the names of a dict, class, cell or object with slots mean now."""
    if isinstance(holder, types.CellType):
        return {} if holder == types.CellType() else {"cell_contents": holder.cell_contents}
    if isinstance(holder, type):
        return {name: value for name, value in vars(holder).items() if name[:2] != "__"}
    if isinstance(holder, MutableMapping):
        return holder
    return {name: getattr(holder, name) for name in slots_of(holder) if hasattr(holder, name)}


def _restore_table(
    holder: Any, names: Collection[str] | None, kept: dict[Any, Any], contents: list[Any]
) -> None:
    now = _table(holder)
    if names is None and holds(now, contents):
        return
    for name in kept.keys() | (now.keys() if names is None else now.keys() & names):
        value, other = kept.get(name, _MISSING), now.get(name, _MISSING)
        if value is other or (isinstance(value, str) and value == other):
            continue
        value = _copied(value)
        if not isinstance(holder, MutableMapping):
            delattr(holder, name) if value is _MISSING else setattr(holder, name, value)
        elif value is _MISSING:
            del holder[name]
        else:
            holder[name] = value


def _copied(value: Any) -> Any:
    """Return a copy of an iterator, where one keeps its state; anything else as it is."""
    if not hasattr(type(value), "__next__"):  # asked of all that is kept: the quick way
        return value
    if type(value) is itertools.count:  # says what it stands at: count(3), or count(3, 2)
        with contextlib.suppress(ValueError, SyntaxError):
            return itertools.count(*ast.literal_eval(f"[{repr(value)[6:-1]}]"))
    iterates = isinstance(value, Iterator) and type(value).__module__ in _COPYABLE
    if not iterates or isinstance(value, types.GeneratorType):
        return value
    with warnings.catch_warnings():  # from Python 3.12 on, that a later one has no such copies
        warnings.simplefilter("ignore", DeprecationWarning)
        return copy.copy(value)
