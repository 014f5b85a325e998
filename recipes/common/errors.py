"""The one error of the recipes: something the user can fix."""

from collections.abc import Collection


class RecipeError(Exception):
    """Say in one line what was expected, what came and how to fix it; the recipe ends with 2."""


def check(fine: object, message: str) -> None:
    """Raise a RecipeError unless all is fine."""
    if not fine:
        raise RecipeError(message)


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known, or that come twice; `what` is what was expected of them."""
    for name in names:
        check(name in known, f"expected {what} {', '.join(known) or 'none'}, got {name!r}")
    for name in names:
        twice = list(names).count(name) > 1
        check(not twice, f"expected each domain once, as source or as target, got {name!r}")
