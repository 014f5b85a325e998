"""The one place that says which version this is, with or without an installation."""

__version__ = "0.1.0"
