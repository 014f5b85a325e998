"""`python -m tests.sweep`: convert every model of a zoo and check each result."""

from .command import main

__all__ = ["main"]
