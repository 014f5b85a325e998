"""Which norms a user means: globs, regular expressions, types, predicates."""

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn

from normswap.errors import ConversionError

Selector: TypeAlias = (
    str | re.Pattern[str] | type | Callable[[str, nn.Module], bool] | Iterable[Any] | None
)


def matches(selector: Selector, names: tuple[str, ...], module: nn.Module) -> bool:
    """Return whether a module, under any of its names, is what a selector means.

    Args:
        selector: a glob on the qualified name, a compiled regular expression (searched), a module
            type, ``fn(name, module)``, or an iterable of these, any of which may match.
        names: the module's qualified names.
        module: the module.

    Raises:
        ConversionError: a selector of another kind.
    """
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(name, selector) for name in names)
    if isinstance(selector, re.Pattern):
        return any(selector.search(name) for name in names)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return any(bool(selector(name, module)) for name in names)
    if isinstance(selector, Iterable):
        return any(matches(part, names, module) for part in selector)
    raise ConversionError(
        "expected select/exclude as a glob, a compiled regular expression, a module type, "
        f"fn(name, module) or a sequence of these, got {type(selector).__name__}"
    )
