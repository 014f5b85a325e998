"""Build a model that fits in memory, give it weights, and find inputs it runs on."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .build import build_filled, build_on_meta, calibrate, count, trim_repeats
from .outputs import Incomparable
from .sources import Candidate
from .structure import describe
from .subject import LABELS, Subject, examine_original

GIB = 2**30
_CALMING_STEPS = 10
# What a process needs besides the model: torch, timm, activations at small inputs.
_OVERHEAD = 1.0 * GIB


@dataclass(frozen=True)
class Limits:
    """How a model is checked.

    Attributes:
        memory: for one process, in bytes.
        seed: of the weights.
        structure: whether to plan only, without values and without running anything.
        blocks: how many to keep of each run of equal blocks; 0: as many as fit.
    """

    memory: float
    seed: int = 0
    structure: bool = False
    blocks: int = 0


@dataclass
class Prepared:
    """A model with random weights that runs, and what it outputs."""

    model: nn.Module
    subject: Subject
    expected: list[torch.Tensor]
    dependent: str
    label: str


def build_shell(chosen: Candidate) -> nn.Module:
    """Build a model without values, of whatever size."""
    try:
        return build_on_meta(lambda: chosen.build(**chosen.attempts[-1].options))
    except Exception:
        # Builders that compute with values cannot run without them.
        return chosen.build(**chosen.attempts[-1].options).eval()


def choose_scale(
    shell: nn.Module, parameters: int, limits: Limits
) -> tuple[int, torch.dtype] | None:
    """Choose what of a model fits: how many of repeated blocks (0: all), and the precision.

    None where nothing fits.
    """

    @functools.cache
    def size(keep: int) -> int:
        if not keep:
            return parameters
        smaller = copy.deepcopy(shell)
        trim_repeats(smaller, keep)
        return count(smaller)["parameters"]

    choices = (
        *((0, torch.float64), (2, torch.float64), (0, torch.float32)),
        *((1, torch.float64), (2, torch.float32), (1, torch.float32)),
    )
    if limits.blocks:
        choices = tuple((limits.blocks, dtype) for dtype in (torch.float64, torch.float32))
    for keep, dtype in choices:
        if size(keep) * dtype.itemsize * 1.3 + _OVERHEAD <= limits.memory:
            return keep, dtype
    return None


def prepare(chosen: Candidate, dtype: torch.dtype, keep: int, seed: int) -> Prepared:
    """Build a model and feed it, in float64 or, where its code cannot, in float32.

    Raises:
        RuntimeError: no inputs it runs on; the message has the last error.
        Incomparable: an output that no check can be made on.
    """
    try:
        return _prepare(chosen, dtype, keep, seed)
    except RuntimeError:
        if dtype == torch.float32:
            raise
        # Code with float32 written into it.
        return _prepare(chosen, torch.float32, keep, seed)


def _prepare(chosen: Candidate, dtype: torch.dtype, keep: int, seed: int) -> Prepared:
    model, built, last = None, None, ""
    for attempt in chosen.attempts:
        try:
            if model is None or built != attempt.options:
                model = None
                model = build_filled(
                    lambda options=attempt.options: chosen.build(**options),
                    chosen.name,
                    seed,
                    dtype,
                    keep,
                )
                built = attempt.options
            subject = Subject(attempt.make, dtype, seed)
            calibrate(model, lambda m, s=subject: s.run(m, range(len(LABELS))))
            _calm(model, subject)
            expected, dependent = examine_original(subject, model)
            return Prepared(model, subject, expected, dependent, attempt.label)
        except (MemoryError, Incomparable):
            raise
        except Exception as error:
            last = f"{attempt.label}: {describe(error)}"
    raise RuntimeError(f"the original runs on none of the inputs tried; last {last}")


def _calm(model: nn.Module, subject: Subject) -> None:
    """Lower the gain of every norm until rounding errors stay rounding errors.

    Deep models with random weights can be chaotic: a last digit of the input moves every digit of
    the output, and two right computations differ in all of them.

    Raises:
        Incomparable: it stays so.
    """
    limit = 1e4 * torch.finfo(subject.dtype).eps
    for _ in range(_CALMING_STEPS):
        moved = subject.rounding(model)
        if moved <= limit:
            return
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_var is not None:
                module.running_var *= 1.25
    raise Incomparable(f"rounding errors of the input alone move the output by {moved:.0e}")
