"""A program: the source of a model, and what is done with it."""

from dataclasses import dataclass, field

PREAMBLE = """\
import collections
import dataclasses
import enum
import functools
import logging
import operator
import os
import random
import types
import typing
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Data:
    x: object
    n: int


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))) + x


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)
"""


@dataclass(frozen=True)
class Call:
    """The model called once.

    Attributes:
        expression: of `model`, the images `x` and the keyword arguments `given` (the labels).
        labels: for each sample 0, 1, or None for unknown; a single one is given for the whole
            batch; () gives none at all.
        train: in training mode, and backward after it.
        size: of the images.
        batch: number of images.
        through: how labels are given: "argument" (a tensor), "names", or "scope" (`use_context`).
    """

    expression: str = "model(x, **given)"
    labels: tuple[int | None, ...] = (0,)
    train: bool = False
    batch: int = 3
    size: int = 6
    through: str = "argument"


@dataclass(frozen=True)
class Change:
    """Statements run between calls, which see `model`, `ns` (the module) and `each(name)`."""

    code: str


@dataclass(frozen=True)
class Copy:
    """The model goes on as a copy of itself, by "deepcopy" or "pickle"."""

    how: str


@dataclass(frozen=True)
class Threads:
    """Two threads call the model at once, each with its own label for the whole batch."""

    expression: str = "model(x, **given)"


@dataclass(frozen=True)
class Original:
    """The model that was converted is itself called, in eval mode."""

    expression: str = "model(x, **given)"


Action = Call | Change | Copy | Threads | Original


@dataclass(frozen=True)
class Program:
    """A model and what is done with it.

    Attributes:
        source: of a module with a class `Model`.
        actions: in order.
        apart: whether the contexts get parameters of their own before the first action.
        unknown: what samples without a label get.
        verify: whether the conversion is given inputs.
        one: the only label there is, where samples or calls touch each other; None where they do
            not.
    """

    source: str
    actions: tuple[Action, ...]
    apart: bool = True
    unknown: str = "pooled"
    verify: bool = False
    one: int | None = None
    names: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """A file that `--replay` takes."""
        lines = [f"    {action!r}," for action in self.actions]
        settings = f"apart={self.apart}, unknown={self.unknown!r}, verify={self.verify}"
        return "\n".join(
            [
                self.source.removeprefix(PREAMBLE).strip(),
                "",
                "ACTIONS = [",
                *lines,
                "]",
                f"SETTINGS = dict({settings}, one={self.one})",
            ]
        )


def parse(text: str) -> Program:
    """Return the program that `str` of one gave."""
    source, _, rest = text.partition("\nACTIONS = [")
    scope: dict[str, object] = {}
    exec(f"from tests.graph.fuzz.program import *\nACTIONS = [{rest}", scope)
    return Program(f"{PREAMBLE}\n\n{source}\n", tuple(scope["ACTIONS"]), **scope["SETTINGS"])
