"""The tensors of any output, and how far two outputs are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Differences allowed, as a share of the largest value of an output: rounding stays far below, a
# wrong label or statistic far above.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class Incomparable(Exception):
    """Two outputs whose structures or shapes do not let them be compared."""


def leaves(output: Any) -> list[Tensor]:
    """Flatten tensors, lists, tuples, dicts, dataclasses; numbers become 0-dim tensors.

    Raises:
        Incomparable: an output of a kind that cannot be looked into.
    """
    if isinstance(output, Tensor):
        return [output]
    if output is None or isinstance(output, str):
        return []
    if isinstance(output, bool | int | float):
        return [torch.tensor(output, dtype=torch.float64)]
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in leaves(value)]
    if isinstance(output, list | tuple):
        return [leaf for value in output for leaf in leaves(value)]
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        return [leaf for name in names for leaf in leaves(getattr(output, name))]
    raise Incomparable(f"outputs a {type(output).__name__}, which is not compared")


def apart(new: list[Tensor], old: list[Tensor]) -> float:
    """Give the largest difference over all tensors, each relative to the largest value of `old`.

    Infinite where one is finite and the other is not, or where integers differ.

    Raises:
        Incomparable: another number of tensors, or other shapes.
    """
    shapes = [tuple(t.shape) for t in new], [tuple(t.shape) for t in old]
    if shapes[0] != shapes[1]:
        raise Incomparable(f"expected outputs of shapes {shapes[1]}, got {shapes[0]}")
    worst = 0.0
    for one, other in zip(new, old, strict=True):
        if not other.numel():
            continue
        if not other.is_floating_point() and not other.is_complex():
            if not torch.equal(one, other):
                return float("inf")
            continue
        finite = other.isfinite()
        if not torch.equal(one.isfinite(), finite):
            return float("inf")
        difference = (one - other).abs().masked_fill(~finite, 0.0).max()
        scale = other.abs().masked_fill(~finite, 0.0).max()
        if float(difference) > 0:
            worst = max(worst, float(difference / scale) if float(scale) else float("inf"))
    return worst


def joined(singles: list[list[Tensor]], whole: list[Tensor]) -> list[Tensor]:
    """Put the outputs of single samples in the layout of a whole batch's.

    A batch gives each tensor once with a row a sample (in dimension 0, or in a later one, as after
    that of layers), or (detection) a list with an entry a sample; a tensor that is the same for
    every batch is taken from the first sample.

    Raises:
        Incomparable: neither fits.
    """
    flat = [tensor for single in singles for tensor in single]
    if len(whole) == len(flat) and len(singles) > 1:
        return flat
    if any(len(single) != len(whole) for single in singles):
        raise Incomparable(
            f"a batch outputs {len(whole)} tensors, its samples {[len(s) for s in singles]}"
        )
    result = []
    for index, tensor in enumerate(whole):
        parts = [single[index] for single in singles]
        along = _dimension(parts, tensor)
        if along is not None:
            result.append(torch.cat(parts, along))
        elif all(part.shape == tensor.shape for part in parts):
            result.append(parts[0])
        else:
            shapes = [tuple(part.shape) for part in parts]
            raise Incomparable(f"a batch outputs {tuple(tensor.shape)}, its samples {shapes}")
    return result


def _dimension(parts: list[Tensor], whole: Tensor) -> int | None:
    """Give the first dimension along which parts make up the shape of a whole, if any does."""
    if any(part.dim() != whole.dim() for part in parts):
        return None
    for d in range(whole.dim()):
        size = sum(part.shape[d] for part in parts)
        if all((*p.shape[:d], size, *p.shape[d + 1 :]) == whole.shape for p in parts):
            return d
    return None


def loss(output: list[Tensor]) -> Tensor:
    """Give a scalar that every floating-point tensor of an output has a part in.

    Raises:
        Incomparable: none has a gradient.
    """
    parts = [t for t in output if t.is_floating_point() and t.requires_grad and t.numel()]
    if not parts:
        raise Incomparable("no output tensor has a gradient")
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=parts[0].dtype)
    for part in parts:
        weight = torch.rand(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)
        total = total + (part * weight).mean()
    return total
