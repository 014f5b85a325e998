"""The one error of the recipes: something the user can fix."""

from collections.abc import Collection


class RecipeError(Exception):
    """Say in one line what was expected, what came and how to fix it; the recipe ends with 2."""


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known, or that come twice; `what` is what was expected of them."""
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"expected {what} {', '.join(known) or 'none'}, got {unknown[0]!r}")
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise RecipeError(f"expected each domain once, as source or as target, got {twice[0]!r}")
