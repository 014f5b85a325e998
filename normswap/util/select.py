"""Which modules a user means: globs, regular expressions, types, predicates."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.util.arguments import check_callable, describe, listed, meant

Selector: TypeAlias = (
    str | re.Pattern[str] | type | Callable[[str, nn.Module], bool] | Iterable[Any] | None
)

# As a selector, the one norm that a forward of the model meets first.
FIRST = "first"
_FORMS = (
    'a glob, "first", a compiled regular expression, a module type, fn(name, module) or a sequence '
    "of these"
)


def read_selector(name: str, selector: Any) -> Selector:
    """Check a selector, see `matches`, and keep what an iterator would yield only once."""
    try:
        return None if selector is None else _read(name, selector)
    except RecursionError:
        raise ConversionError(f"expected {name}= as {_FORMS}, got one that holds itself") from None


def _read(name: str, selector: Any) -> Selector:
    if isinstance(selector, str | re.Pattern | type):
        return selector
    if isinstance(selector, Iterable) and not isinstance(selector, nn.Module | Tensor | Mapping):
        return tuple(_read(name, part) for part in selector)
    if not callable(selector) or isinstance(selector, nn.Module):
        raise ConversionError(f"expected {name}= as {_FORMS}, got {describe(selector)}")
    check_callable(name, selector, "fn(name, module)", 2)
    return selector  # type: ignore[no-any-return]


def why_kept(select: Selector, exclude: Selector, names: tuple[str, ...], module: nn.Module) -> str:
    """Return why a user's choice leaves a module alone, "" where it does not; see `matches`."""
    if select is not None and not matches(select, names, module):
        return "not selected"
    return "excluded" if exclude is not None and matches(exclude, names, module) else ""


def matches(selector: Selector, names: tuple[str, ...], module: nn.Module) -> bool:
    """Return whether a module, under any of its names, is what a selector means.

    Args:
        selector: a glob on the qualified name, a compiled regular expression (searched), a module
            type, ``fn(name, module)``, or an iterable of these, any of which may match.
        names: the module's qualified names.
        module: the module.

    Raises:
        ConversionError: a function that returns something else than whether.
    """
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(name, selector) for name in names)
    if isinstance(selector, re.Pattern):
        return any(selector.search(name) for name in names)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if isinstance(selector, Iterable):
        return any(matches(part, names, module) for part in selector)
    assert selector is not None
    return any(_ask(selector, name, module) for name in names)


def check_meant(argument: str, selector: Selector, names: Sequence[str]) -> None:
    """Raise if a name or a pattern, or one of several, matches none of the names there are.

    A type or a function may, which are written for many models.
    """
    if isinstance(selector, tuple):
        for part in selector:
            check_meant(argument, part, names)
    elif isinstance(selector, str | re.Pattern):
        if not matches(selector, tuple(names), nn.Identity()):
            raise ConversionError(
                f"expected {argument}= to match one of {listed(names, 5)}, got "
                f"{describe(selector)}{closest(selector, names)}"
            )


def closest(selector: Any, names: Iterable[str]) -> str:
    """Return a hint at what a selector that matches none of some names meant, "" for none."""
    names = list(names)
    if isinstance(selector, str) and any(name.startswith(f"{selector}.") for name in names):
        return f"; for all inside of it write '{selector}.*'"
    return meant(selector, names)


def find_modules(name: str, selector: Any, model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that a selector means, at least one for each of its parts."""
    read = read_selector(name, selector)
    if isinstance(read, tuple):
        return [module for part in read for module in find_modules(name, part, model)]
    if read == "":
        raise ConversionError(
            f"expected {name}= to name parts of {type(model).__name__}, got '', the model itself"
        )
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    found = [m for m, fqns in names.items() if matches(read, tuple(fqns), m)]
    if not found:
        close = meant(read, [fqn for fqns in names.values() for fqn in fqns])
        raise ConversionError(
            f"expected {name}= to match a module of {type(model).__name__}, got "
            f"{describe(read)}{close}"
        )
    return found


def _ask(selector: Callable[[str, nn.Module], Any], name: str, module: nn.Module) -> bool:
    answer = selector(name, module)
    # What a pattern's match or a count returns is meant as yes or no; a tensor is a mistake.
    if not isinstance(answer, bool | int | str | re.Match | None):
        raise ConversionError(
            "expected the function that selects modules to return True or False, got "
            f"{describe(answer)} for {name}"
        )
    return bool(answer)
