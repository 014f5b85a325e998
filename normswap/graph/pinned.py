"""What functions hold: a copy of a model shares its functions with the original, and so these."""

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from normswap.graph.tracing.bytecode import codes_of, read_code
from normswap.util.elements import elements_of


def find_pinned(value: Any, met: set[tuple[int, bool]]) -> Iterator[nn.Module | Tensor]:
    """Yield the modules and tensors that functions in a value hold.

    A function holds what is in its closure and its defaults, and the globals it names; a weak
    reference goes on meaning its module, too. Whatever else there is, partials, bound methods and
    objects, is copied with a model.

    Args:
        value: any.
        met: what other values led to, and is not looked at again: by way of its globals, one
            function of a package may lead to all.
    """
    waiting = [(value, False)]
    while waiting:
        item, pinned = waiting.pop()
        function = isinstance(item, types.FunctionType)
        pinned |= function
        if isinstance(item, nn.Module | Tensor):
            if pinned:
                yield item
            continue
        if (id(item), pinned) in met:
            continue
        met.add((id(item), pinned))
        if isinstance(item, weakref.ref):
            waiting += [(item(), True)] if isinstance(item(), nn.Module) else []
            continue
        waiting += [(part, pinned) for part in (_parts_of(item) if function else _items_of(item))]


def closure_of(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function's free variables hold, where they hold something."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}


def _parts_of(function: types.FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    yield from closure_of(function).values()
    loads = [
        load for code in codes_of(function.__code__) for load in read_code(code).loads.values()
    ]
    yield from (function.__globals__.get(load.name) for load in loads if not load.free)


def _items_of(item: Any) -> Iterator[Any]:
    if isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, list | tuple | set | frozenset | dict):
        yield from elements_of(item)
    elif not isinstance(item, type | types.ModuleType | weakref.ProxyType):
        attributes = getattr(item, "__dict__", None)
        yield from attributes.values() if isinstance(attributes, dict) else ()
