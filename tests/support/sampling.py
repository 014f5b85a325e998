"""Parameters of which every run takes a few, and a run of the `exhaustive` tests the others."""

import pytest


def sampled(values, few):
    """Return parameters, all after the first few marked `exhaustive`."""
    values = list(values)
    others = [v if isinstance(v, tuple) else (v,) for v in values[few:]]
    return values[:few] + [pytest.param(*v, marks=pytest.mark.exhaustive) for v in others]
