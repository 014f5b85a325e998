"""Generators of random numbers, of Python, NumPy and torch: read, set and start them anew."""

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Controls(NamedTuple):
    """What reads, sets and seeds the state of a generator of random numbers."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    start: Callable[[int], object]


def global_controls() -> list[Controls]:
    """Return what reads, sets and seeds the states that all code shares, on the CPU."""
    found = [
        Controls(random.getstate, random.setstate, random.seed),
        Controls(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed),
    ]
    # NumPy is no dependency: only where the program has imported it.
    if numpy := sys.modules.get("numpy.random"):
        found.append(Controls(numpy.get_state, numpy.set_state, numpy.seed))
    return found


@contextmanager
def started_from(seed: int | None) -> Iterator[None]:
    """Have what all code shares start from a seed, None from where it is, and put it back."""
    states = [(controls, controls.read()) for controls in global_controls()]
    try:
        if seed is not None:
            for controls, _ in states:
                controls.start(seed)
        yield
    finally:
        for controls, state in states:
            controls.write(state)


def controls_of(value: object) -> Controls | None:
    """Return what reads, sets and seeds the state of a generator of random numbers."""
    if isinstance(value, torch.Generator):
        return Controls(value.get_state, value.set_state, value.manual_seed)
    if isinstance(value, random.Random):
        return Controls(value.getstate, value.setstate, value.seed)
    numpy: Any = sys.modules.get("numpy.random")
    if numpy and isinstance(value, numpy.RandomState):
        return Controls(value.get_state, value.set_state, value.seed)
    if numpy and isinstance(value, numpy.Generator):
        bits: Any = value.bit_generator
        write = functools.partial(setattr, bits, "state")
        return Controls(lambda: bits.state, write, lambda seed: write(type(bits)(seed).state))
    return None


def is_equal(one: Any, other: Any) -> bool:
    """Return whether two states of a generator are equal: tensors, or what may hold arrays."""
    if isinstance(one, dict):
        return all(map(is_equal, one.values(), other.values()))
    if isinstance(one, tuple) and any(hasattr(part, "all") for part in one):
        return all(map(is_equal, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
