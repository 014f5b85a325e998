"""What a copy shares with its original: what functions hold, and what classes keep of a model."""

import functools
import types
import weakref
from collections.abc import Iterator

from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.graph.code.bytecode import closure_of, codes_of, read_code
from normswap.graph.code.library import is_library
from normswap.graph.code.uses import is_written
from normswap.graph.questions.class_questions import reachable
from normswap.util.copies import attributes_of
from normswap.util.elements import COLLECTIONS, elements_of, holds_nothing, slots_of
from normswap.util.original_class import STATE, class_of


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
    names |= {id(p): names[id(m)] for m in model.modules() for p in proxies_of(m)}
    met = set[tuple[int, bool]]()
    for where, value in (*attributes_of(model), *functions_of(model)):
        if holds_nothing(value):
            continue
        if where.rpartition(".")[2].startswith(STATE) or _is_ours(value):
            continue  # what a conversion put there takes care of copies itself
        original = next((names[id(h)] for h in find_pinned(value, met) if id(h) in names), None)
        if original is not None:
            raise ConversionError(
                f"cannot copy the model: {where} holds a function or weak reference that uses "
                f"{original} of the original, and would in the copy; pass inplace=True"
            )


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("normswap.")


def _listed_by_classes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what lists, sets and dicts among the attributes of a model's classes hold."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    for cls in classes:
        for key, table in list(vars(cls).items()):
            if isinstance(table, weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
                items = [*table.keys(), *table.values()]
            elif isinstance(table, weakref.WeakSet):
                items = [*table]
            else:
                keys = dict.keys(table) if isinstance(table, dict) else ()
                items = [*elements_of(table), *keys]
            for item in items:
                yield f"{cls.__name__}.{key}", item() if isinstance(item, weakref.ref) else item


def proxies_of(module: nn.Module) -> list[object]:
    """Return the weak proxies of a module, which stand for it."""
    return [ref for ref in weakref.getweakrefs(module) if type(ref) in weakref.ProxyTypes]


def functions_of(model: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the functions of the user's that forwards of a model may call, by name."""
    for cls in {class_of(module) for module in model.modules()}:
        if not is_library(cls.__module__):
            yield from ((f"what {f.__module__}.{f.__qualname__} names", f) for f in reachable(cls))


def find_pinned(value: object, met: set[tuple[int, bool]]) -> Iterator[nn.Module | Tensor]:
    """Yield the modules and tensors that functions in a value hold.

    A function holds what is in its closure and its defaults, and the globals it names; a weak
    reference or proxy goes on meaning its module, too. Whatever else there is, partials, bound
    methods and objects, is copied with a model.

    Args:
        value: any.
        met: what other values led to, and is not looked at again: by way of its globals, one
            function of a package may lead to all.
    """
    waiting = [(value, False)]
    while waiting:
        item, pinned = waiting.pop()
        pinned |= isinstance(item, types.FunctionType) or type(item) in weakref.ProxyTypes
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
        waiting += [(part, pinned) for part in parts if not holds_nothing(part)]


def _parts_of(function: types.FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    yield from closure_of(function).values()
    if is_library(function.__globals__.get("__name__")):
        return  # whose globals are none of a user's
    loads = [
        load for code in codes_of(function.__code__) for load in read_code(code).loads.values()
    ]
    names = (load.name for load in loads if not load.free)
    yield from (function.__globals__.get(name) for name in names if is_written(name))


def _items_of(item: object) -> Iterator[object]:
    if isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, COLLECTIONS):
        yield from elements_of(item)
    elif not isinstance(item, type | types.ModuleType | weakref.ProxyType):
        attributes = getattr(item, "__dict__", None)
        yield from attributes.values() if isinstance(attributes, dict) else ()
        yield from (getattr(item, name) for name in slots_of(item) if hasattr(item, name))
