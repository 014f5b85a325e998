"""What a copy shares with its original: what functions hold, and what classes keep of a model."""

import functools
import types
import weakref
from collections.abc import Iterator

from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.graph.tracing.bytecode import codes_of, read_code
from normswap.util.copies import attributes_of
from normswap.util.elements import elements_of
from normswap.util.original_class import STATE


def check_copyable(model: nn.Module) -> None:
    """Raise if a copy would use the original's modules, or be missed by who acts on these.

    A function among its attributes may do the one. A class that lists its instances, to reset
    them all (snntorch's neurons), does the other.

    Raises:
        ConversionError: naming the function, or the attribute of the class.
    """
    names = {id(m): f"the module {name or 'itself'}" for name, m in model.named_modules()}
    listed = _listed_by_classes(model)
    found = next((entry for entry in listed if id(entry[1]) in names), None)
    if found is not None:
        raise ConversionError(
            f"cannot copy the model: the class attribute {found[0]} holds {names[id(found[1])]}, "
            "and would not hold that of the copy; pass inplace=True, or pass copy.deepcopy(model) "
            "if nothing that you call goes by that attribute"
        )
    names |= {
        id(t): f"the tensor {name}"
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    met = set[tuple[int, bool]]()
    for where, value in attributes_of(model):
        if where.rpartition(".")[2].startswith(STATE) or _is_ours(value):
            continue  # what a conversion put there takes care of copies itself
        held = next((names[id(h)] for h in find_pinned(value, met) if id(h) in names), None)
        if held is not None:
            raise ConversionError(
                f"cannot copy the model: {where} holds a function or weak reference that uses "
                f"{held} of the original, and would in the copy; pass inplace=True"
            )


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("normswap.")


def _listed_by_classes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what lists, sets and dicts among the attributes of a model's classes hold."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    for cls in classes:
        for key, table in list(vars(cls).items()):
            if isinstance(table, weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
                held = [*table.keys(), *table.values()]
            elif isinstance(table, weakref.WeakSet):
                held = [*table]
            else:
                held = [*elements_of(table), *(dict.keys(table) if isinstance(table, dict) else ())]
            for item in held:
                yield f"{cls.__name__}.{key}", item() if isinstance(item, weakref.ref) else item


def find_pinned(value: object, met: set[tuple[int, bool]]) -> Iterator[nn.Module | Tensor]:
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
        pinned |= isinstance(item, types.FunctionType)
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
        parts = _parts_of(item) if isinstance(item, types.FunctionType) else _items_of(item)
        waiting += [(part, pinned) for part in parts]


def closure_of(function: types.FunctionType) -> dict[str, object]:
    """Return what a function's free variables hold, where they hold something."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}


def _parts_of(function: types.FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    yield from closure_of(function).values()
    loads = [
        load for code in codes_of(function.__code__) for load in read_code(code).loads.values()
    ]
    yield from (function.__globals__.get(load.name) for load in loads if not load.free)


def _items_of(item: object) -> Iterator[object]:
    if isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, list | tuple | set | frozenset | dict):
        yield from elements_of(item)
    elif not isinstance(item, type | types.ModuleType | weakref.ProxyType):
        attributes = getattr(item, "__dict__", None)
        yield from attributes.values() if isinstance(attributes, dict) else ()
