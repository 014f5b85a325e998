"""Lists and dicts that a forward is given, or hands on, and that the callee may change.

A graph takes such an argument apart, so that what its forward appends would be lost. A container
that changes one returns the new contents beside its output, and they are written back into the
caller's object; the graph of the caller reads them from there. Whom a forward hands its lists to is
therefore traced first, and one whose effect on them is not known ends the trace.

Serves HRNet and VoVNet in timm, whose stages hand each other lists.
"""

from collections import OrderedDict
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from torch import fx, nn

from normswap.graph.tracing.failure import TraceFailure, is_torch
from normswap.graph.tracing.value_kinds import any_leaf, find_lists
from normswap.util.original_class import container_class

# Position of an argument, and the keys its object has after the forward.
Writes = tuple[tuple[int, tuple[Any, ...]], ...]


class GivenLists(NamedTuple):
    """The lists and dicts of one call that the callee changes.

    Attributes:
        nodes: (object, its node) of each.
        keys: what each holds afterwards.
    """

    nodes: tuple[tuple[Any, Any], ...] = ()
    keys: tuple[tuple[Any, ...], ...] = ()


def keys_of(value: Any) -> tuple[Any, ...]:
    """Return the keys of a dict or the positions of a list."""
    return tuple(value) if isinstance(value, dict) else tuple(range(len(value)))


def contents(value: Any) -> list[tuple[Any, Any]]:
    """Return the (key, value) pairs of a list or dict."""
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def snapshot_lists(values: Any) -> list[tuple[Any, list[tuple[Any, Any]]]]:
    """Return every list and dict inside some values, with its contents."""
    return [(holder, contents(holder)) for holder in find_lists(values)]


def find_writes(
    values: tuple[Any, ...], before: list[tuple[Any, list[tuple[Any, Any]]]], output: Any
) -> Writes:
    """Return what a forward did to its arguments.

    Raises:
        TraceFailure: it changed one inside another, or returns one.
    """
    changed = [holder for holder, old in before if not _same(contents(holder), old)]
    writes = []
    for index, value in enumerate(values):
        if _among(value, changed):
            writes.append((index, keys_of(value)))
            if any(_among(part, [holder for holder, _ in before]) for _, part in contents(value)):
                raise TraceFailure("changes a list or dict that holds another it was given")
    if len(writes) < len(changed):
        raise TraceFailure("changes a list or dict inside an argument it was given")
    if any(_among(holder, [given for given, _ in before]) for holder in find_lists(output)):
        raise TraceFailure("returns a list or dict it was given")
    return tuple(writes)


def write_back(target: Any, new: Any) -> None:
    """Give a list or dict new contents."""
    target.clear()
    target.extend(new) if isinstance(target, list) else target.update(new)


def aliased(values: tuple[Any, ...]) -> bool:
    """Return whether some list or dict is, or is inside, two of the arguments."""
    holders = list(find_lists(values))
    return any(_among(holder, holders[:i]) for i, holder in enumerate(holders))


def may_be_changed(value: Any) -> bool:
    """Return whether a callee could change a list or dict to something a graph would not see.

    Constants in a list are mostly written in the call, for nobody else to see. Objects of data
    classes, which a graph builds anew, count as lists.
    """
    return holds_objects(value) or any(
        not holder or any_leaf(holder, (fx.Proxy,)) for holder in find_lists(value)
    )


def holds_objects(value: Any) -> bool:
    """Return whether a value is, or holds, an object whose fields can be set."""
    if isinstance(value, list | tuple | dict) and not is_dataclass(value):
        parts = value.values() if isinstance(value, dict) else value
        return any(map(holds_objects, parts))
    frozen = getattr(type(value), "__dataclass_params__", None)
    return frozen is not None and not frozen.frozen


def hand_on(
    tracer: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], GivenLists]:
    """Make nodes of the lists and dicts among the arguments of a call that changes them.

    Raises:
        TraceFailure: it may change them, and what it does to them is not known.
    """
    given: tuple[Any, ...] = (*args, *kwargs.values())
    if not any(map(may_be_changed, given)) and not any(map(tracer.reads.holds, find_lists(given))):
        return args, kwargs, GivenLists()
    if all(is_torch(container_class(m).__module__) for m in module.modules()):
        return args, kwargs, GivenLists()
    name = container_class(module).__name__
    found = tracer.writes_of(module, args, kwargs)
    if found is None:
        raise TraceFailure(f"hands a list or dict to a {name} that may change it")
    values, writes = found
    if not writes:
        return args, kwargs, GivenLists()
    if aliased(values):
        raise TraceFailure(f"hands a list or dict to a {name} twice")
    nodes: list[tuple[Any, Any]] = []

    def swap(value: Any) -> Any:
        place = next((i for i, (index, _) in enumerate(writes) if values[index] is value), None)
        if place is None:
            return value
        parts = [part for _, part in contents(value)]
        arguments = (tuple(value), *parts) if isinstance(value, dict) else parts
        node = tracer.create_proxy("call_function", _MAKE[type(value)], tuple(arguments), {})
        nodes.append((value, node))
        return node

    args = tuple(swap(value) for value in args)
    kwargs = {key: swap(value) for key, value in kwargs.items()}
    keys = {id(values[index]): keys for index, keys in writes}
    return args, kwargs, GivenLists(tuple(nodes), tuple(keys[id(value)] for value, _ in nodes))


def take_back(given_lists: GivenLists) -> None:
    """After the call: read what it changed."""
    for (value, node), keys in zip(given_lists.nodes, given_lists.keys, strict=True):
        new = [(key, node[key]) for key in keys]
        write_back(value, dict(new) if isinstance(value, dict) else [part for _, part in new])


def make_list(*parts: Any) -> list[Any]:
    """Return a list of the arguments."""
    return list(parts)


def make_dict(keys: tuple[Any, ...], *parts: Any) -> dict[Any, Any]:
    """Return a dict of these keys."""
    return dict(zip(keys, parts))  # noqa: B905 - for dynamo


def make_ordered(keys: tuple[Any, ...], *parts: Any) -> "OrderedDict[Any, Any]":
    """Return an ordered dict of these keys."""
    return OrderedDict(zip(keys, parts))  # noqa: B905 - for dynamo


_MAKE: dict[type, Any] = {list: make_list, dict: make_dict, OrderedDict: make_ordered}


def _among(value: Any, holders: list[Any]) -> bool:
    return any([holder is value for holder in holders])


def _same(now: list[tuple[Any, Any]], old: list[tuple[Any, Any]]) -> bool:
    pairs = zip(now, old, strict=False)
    return len(now) == len(old) and all(a == c and b is d for (a, b), (c, d) in pairs)
