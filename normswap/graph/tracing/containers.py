"""Lists, dicts and sets that a forward read: copied, compared with the copy, put back."""

from typing import Any


def copy_parts(value: Any) -> Any:
    """Copy the lists, dicts and sets of a value."""
    if type(value) is list:
        return [copy_parts(part) for part in value]
    if isinstance(value, tuple):
        return tuple.__new__(type(value), [copy_parts(part) for part in value])
    if isinstance(value, dict):
        copy = value.copy()
        copy.update((key, copy_parts(part)) for key, part in value.items())
        return copy
    return value.copy() if isinstance(value, set) else value


def copy_alone(value: Any) -> Any:
    """Copy a list, dict or set, not what it holds."""
    return list(value) if isinstance(value, list) else value.copy()


def find_mutable(value: Any) -> list[Any]:
    """Return every list, dict and set that a value is or holds."""
    parts = value.values() if isinstance(value, dict) else value
    found = [value] if isinstance(value, list | dict | set) else []
    if isinstance(value, list | tuple | dict):
        found += [inner for part in parts for inner in find_mutable(part)]
    return found


def same_parts(now: Any, before: Any) -> bool:
    """Return whether a list, dict or set holds the very same objects as before."""
    if isinstance(now, set):
        return bool(now == before)
    if isinstance(now, dict):
        return list(now) == list(before) and all(now[k] is before[k] for k in before)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def restore(now: Any, before: Any) -> None:
    """Give a list, dict or set the contents it had."""
    now.clear()
    now.extend(before) if isinstance(now, list) else now.update(before)
