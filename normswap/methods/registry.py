"""The methods by name: those of this folder, of other packages, and registered ones."""

import functools
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from normswap.errors import ConversionError
from normswap.util.arguments import check_choice, meant

if TYPE_CHECKING:
    from normswap.methods.base import BaseMethod

GROUP = "normswap.methods"
_REGISTRY: dict[str, "BaseMethod"] = {}
M = TypeVar("M", bound="type[BaseMethod]")


@functools.cache
def import_own() -> None:
    """Import every file of this folder; those that hold a method register it."""
    for module in pkgutil.iter_modules(sys.modules[__package__].__path__):
        importlib.import_module(f"{__package__}.{module.name}")


@functools.cache
def import_installed() -> None:
    """Load what installed packages name in the entry-point group `GROUP`.

    Each entry is a module, or a class in one, that registers a method.

    Warns:
        UserWarning: an entry that fails; the others are there all the same.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            package = "an unknown package" if entry.dist is None else entry.dist.name
            warnings.warn(
                f"the method {entry.name!r} of {package} is not there: loading its entry point "
                f"{entry.value!r} ({GROUP}) failed with {type(error).__name__}: {error}",
                stacklevel=3,
            )


def register_method(cls: M) -> M:
    """Add a method to the registry, as a class decorator.

    Raises:
        ConversionError: the name is taken by another class, or `options` is not a dataclass.
    """
    if not cls.__module__.startswith(f"{__package__}."):
        import_own()
    taken = _REGISTRY.get(cls.name)
    if taken is not None and type(taken).__qualname__ != cls.__qualname__:
        raise ConversionError(f"a method {cls.name!r} is registered already: {type(taken)}")
    if not is_dataclass(cls.options):
        raise ConversionError(
            f"expected the options of method {cls.name!r} as a dataclass, got {cls.options!r}"
        )
    _REGISTRY[cls.name] = cls()
    return cls


def methods() -> list[str]:
    """Return the names of all methods: the package's, those registered, other packages'."""
    import_own()
    import_installed()
    return sorted(_REGISTRY)


def get_method(name: str) -> "BaseMethod":
    """Return a method by name.

    Raises:
        UnknownNameError: no such method; the message lists the names.
    """
    import_own()
    if not isinstance(name, str) or name not in _REGISTRY:
        check_choice("method", name, methods())
    return _REGISTRY[name]


def parse_options(method: "BaseMethod", given: dict[str, Any], others: Iterable[str] = ()) -> Any:
    """Build a method's options from keyword arguments.

    Args:
        method: whose options.
        given: by name.
        others: further names that the caller could have used; one may be what was meant.

    Raises:
        ConversionError: an option the method does not have; the message lists those it has.
    """
    names = [f.name for f in fields(method.options)]
    for name in sorted(set(given) - set(names)):
        raise ConversionError(
            f"unknown option {name} for method {method.name!r}; its options: "
            f"{', '.join(names) or 'none'}{meant(name, [*names, *others], '{}=')}"
        )
    return method.options(**given)
