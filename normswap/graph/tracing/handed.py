"""Lists and dicts that a forward is given, or hands on, and that the callee may change.

A graph takes such an argument apart, so that what its forward appends would be lost. A container
that changes one returns the new contents beside its output, and they are written back into the
caller's object; the graph of the caller reads them from there. One that returns the very object it
was given says so, and the caller's own object is its result.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

from torch import nn

from normswap.graph.tracing.mutates import may_change
from normswap.graph.tracing.origin import is_torch
from normswap.graph.tracing.patches import TraceFailure
from normswap.graph.tracing.signature import EXAMPLE
from normswap.graph.tracing.values import describe, find_lists, rebuild
from normswap.graph.tracing.watched import Watched, check_lists, contents, keys_of, watch_lists

# Position of an argument, and the keys its object has after the forward.
Write = tuple[int, tuple[Any, ...]]
# Path in the output -> position of the argument that is there.
Returned = tuple[tuple[tuple[Any, ...], int], ...]


class Effects(NamedTuple):
    """What a forward does to the lists and dicts it is given.

    Attributes:
        writes: which arguments it changes.
        returned: which of them it returns, and where in its output.
        width: length of the output where it is a tuple and those are parts of it.
    """

    writes: tuple[Write, ...] = ()
    returned: Returned = ()
    width: int | None = None


NOTHING = Effects()


def snapshot_lists(values: Any) -> list[tuple[Any, list[tuple[Any, Any]]]]:
    """Return every list and dict inside some values, with its contents."""
    return [(holder, contents(holder)) for holder in find_lists(values)]


def find_effects(
    values: tuple[Any, ...], before: list[tuple[Any, Any]], output: Any
) -> tuple[Effects, Any]:
    """Return what a forward did to its arguments, and the output without those it returns.

    Raises:
        TraceFailure: it changed or returned one inside another.
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
    returned = tuple(_locate(output, values))
    output = _put(output, [(path, None) for path, _ in returned])
    given = [holder for holder, _ in before]
    if given and any(_among(holder, given) for holder in find_lists(output)):
        raise TraceFailure("returns a part of a list or dict it was given")
    flat = bool(returned) and type(output) is tuple and all(len(path) == 1 for path, _ in returned)
    return Effects(tuple(writes), returned, len(output) if flat else None), output


def write_back(target: Any, new: Any) -> None:
    """Give a list or dict new contents."""
    target.clear()
    target.extend(new) if isinstance(target, list) else target.update(new)


def give_back(output: Any, returned: Returned, values: tuple[Any, ...]) -> Any:
    """Put the arguments that a forward returns in their places of its output."""
    return _put(output, [(path, values[place]) for path, place in returned])


def _locate(output: Any, values: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield the path in an output, and the position, of every argument that is in it."""
    if isinstance(output, list | dict):
        place = next((i for i, value in enumerate(values) if value is output), None)
        if place is not None:
            yield (), place
            return
    if type(output) in (tuple, list, dict):
        parts = enumerate(output) if isinstance(output, tuple) else contents(output)
        for key, part in parts:
            for path, place in _locate(part, values):
                yield (key, *path), place


def _put(output: Any, parts: list[tuple[tuple[Any, ...], Any]]) -> Any:
    """Return an output with these parts at these paths."""
    for path, part in parts:
        if not path:
            return part
        key, inner = path[0], _put(output[path[0]], [(path[1:], part)])
        if isinstance(output, dict):
            output = {**output, key: inner}
        else:
            output = type(output)([inner if i == key else v for i, v in enumerate(output)])
    return output


def aliased(values: tuple[Any, ...]) -> bool:
    """Return whether some list or dict is, or is inside, two of the arguments."""
    holders = list(find_lists(values))
    return any(_among(holder, holders[:i]) for i, holder in enumerate(holders))


class Handed(NamedTuple):
    """The lists and dicts of one call.

    Attributes:
        nodes: (object, its node, its parts) of those that are watched.
        values: arguments of the callee, one a parameter; empty where nothing is known of it.
        effects: what it does to them.
    """

    nodes: tuple[Watched, ...] = ()
    values: tuple[Any, ...] = ()
    effects: Effects = NOTHING


def hand_on(
    tracer: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Handed]:
    """Make nodes of the lists and dicts among the arguments of a call that may change them.

    A child whose effects on such arguments are not known yet is taken to have none, and noted
    among what the trace assumed.

    Raises:
        TraceFailure: it may change them, and what it does to them is not known.
    """
    values: tuple[Any, ...] = (*args, *kwargs.values())
    given = next(find_lists(values), None)
    if given is None or all(is_torch(_class_of(m).__module__) for m in module.modules()):
        return args, kwargs, Handed()
    effects = None
    state = vars(module).get("_normswap")
    tracer.result.plain = False  # what a child does with a list depends on more than its class
    if state is not None and state.override is None:
        cls: Any = type(module)
        values = cls.bind(module, *args, **kwargs)
        variant = state.find(module, values)
        if variant is None:
            return args, kwargs, _assume(tracer, module, values)
        if variant.run is not None:
            effects = variant.effects
    elif state is None:
        values = (args, kwargs)
        key = (id(module), tuple([describe(value, [], True) for value in values]))
        if key not in tracer.probed:
            return args, kwargs, _assume(tracer, module, values)
        effects = tracer.probed[key]
        if effects is not None and effects != NOTHING:
            raise TraceFailure(f"hands a list or dict to a {_name(module)} that changes it")
    if effects is None and any(may_change(_class_of(m)) for m in module.modules()):
        raise TraceFailure(f"hands a list or dict to a {_name(module)} that may change it")
    if (effects is None or effects.writes) and aliased(values):
        raise TraceFailure(f"hands a list or dict to a {_name(module)} twice")
    if effects is not None and not effects.writes:
        return args, kwargs, Handed((), values, effects)
    args, kwargs, nodes = watch_lists(tracer, args, kwargs)
    return args, kwargs, Handed(tuple(nodes), values, effects or NOTHING)


def _assume(tracer: Any, module: nn.Module, values: tuple[Any, ...]) -> Handed:
    like = [rebuild(describe(v, [], True), repeat(EXAMPLE)) for v in values]
    tracer.result.assumed.append((module, tuple(like)))
    return Handed()


def take_back(tracer: Any, module: nn.Module, handed: Handed, output: Any) -> Any:
    """After the call: read what it changed, check the rest; return its output."""
    written = {id(handed.values[index]): keys for index, keys in handed.effects.writes}
    rest = []
    for value, node, parts in handed.nodes:
        keys = written.get(id(value))
        if keys is None:
            rest.append((value, node, parts))
        else:
            made: Any = node
            new = [(key, made[key]) for key in keys]
            write_back(value, dict(new) if isinstance(value, dict) else [p for _, p in new])
    _, returned, width = handed.effects
    check_lists(tracer, _name(module), rest, None if returned else output)
    if width is not None:
        output = tuple(output[i] for i in range(width))
    elif any(path for path, _ in returned):
        # Whatever comes later might change the list in one of its places and read the other.
        tracer.result.last = output.node
        return output
    return give_back(output, returned, handed.values)


def _class_of(module: nn.Module) -> type:
    return getattr(type(module), "converted_from", type(module))


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _among(value: Any, holders: list[Any]) -> bool:
    return any([holder is value for holder in holders])


def _same(now: list[tuple[Any, Any]], old: list[tuple[Any, Any]]) -> bool:
    pairs = zip(now, old, strict=False)
    return len(now) == len(old) and all(a == c and b is d for (a, b), (c, d) in pairs)
