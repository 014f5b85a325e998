"""The one error of the recipes: something the user can fix."""

from __future__ import annotations


class RecipeError(Exception):
    """Say in one line what was expected, what came and how to fix it; the recipe ends with 2."""
