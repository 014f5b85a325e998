"""Parameters of which every run takes a few, and a run of the `exhaustive` tests the others."""

import itertools

import pytest


def sampled(values, few):
    """Return parameters, all after the first few marked `exhaustive`."""
    values = list(values)
    others = [v if isinstance(v, tuple) else (v,) for v in values[few:]]
    return values[:few] + [pytest.param(*v, marks=pytest.mark.exhaustive) for v in others]


def crossed(first, second):
    """Return all pairs of values; those that every run takes have each value once or more."""
    first, second = list(first), list(second)
    longest = range(max(len(first), len(second)))
    few = [(first[i % len(first)], second[i % len(second)]) for i in longest]
    return sampled(few + [p for p in itertools.product(first, second) if p not in few], len(few))
