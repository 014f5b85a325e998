"""Benchmarks: `python -m tests.bench`; not collected with the tests."""
