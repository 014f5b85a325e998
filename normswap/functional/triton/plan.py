"""How x is cut into tiles, a program for each: by shape and layout alone.

Nothing is tuned by running it and no value is read, so that no launch makes the host wait and
CUDA graphs can replay it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.functional.kernels import is_channels_last

# Values of a tile, and the channels of one where channels are last: 16 values a thread.
_TILE, _WIDTH = 2048, 64
# Rows of a table in a step, and channels.
_STEP, _COLUMNS = 64, 16
# Programs that keep a large GPU busy: eight for each of 132 multiprocessors.
_PROGRAMS = 1056
# Below them, offsets in a tile and the number of a program fit into int32.
_MOST_POSITIONS, _MOST_PROGRAMS = 2**30, 2**31


class Plan(NamedTuple):
    """A cut of x (N, C, *), as (N, positions, C), into parts of the positions, each a program's.

    Attributes:
        shape: N, C, positions.
        splits: parts of an instance.
        part: positions of a part; the last one may have fewer.
        programs: of a launch.
        geometry: what the kernels of `tile` take as C, M, sn, sm, sc, S and PART.
        blocks: what they take as BM and BC, the positions and channels of a tile.
    """

    shape: tuple[int, int, int]
    splits: int
    part: int
    programs: int
    geometry: tuple[int, ...]
    blocks: dict[str, int]


def plan(x: Tensor) -> Plan:
    """Return the cut of x, contiguous or with its channels last."""
    return plan_of(x.shape, x.is_contiguous())


def serves(x: Tensor) -> bool:
    """Return whether x is laid out as kernels read it, and the numbers of a launch fit."""
    if not (x.is_contiguous() or is_channels_last(x)):
        return False
    found = plan(x)
    return found.shape[2] < _MOST_POSITIONS and found.programs < _MOST_PROGRAMS


@lru_cache(maxsize=4096)
def plan_of(shape: torch.Size, contiguous: bool) -> Plan:
    """Return the cut of x of a shape, contiguous or else with its channels last."""
    instances, channels, positions = shape[0], shape[1], shape[2:].numel()
    if contiguous:
        rows = min(_TILE // 2, pow2(positions))
        columns = min(_TILE // rows, pow2(channels))
        strides = (channels * positions, 1, positions)
    else:
        columns = min(_WIDTH, pow2(channels))
        rows = min(_TILE // columns, pow2(positions))
        strides = (channels * positions, channels, 1)
    wanted = _PROGRAMS // (instances * -(-channels // columns))
    splits = max(1, min(-(-positions // rows), wanted))
    part = -(-positions // (splits * rows)) * rows
    splits = -(-positions // part)
    return Plan(
        (instances, channels, positions),
        splits,
        part,
        instances * splits * -(-channels // columns),
        (channels, positions, *strides, splits, part),
        {"BM": rows, "BC": columns},
    )


def pow2(count: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def cut_rows(rows: int, channels: int) -> tuple[int, dict[str, int]]:
    """Return how many programs share tables (rows, C), and their constants.

    One has a row and BC channels, and walks others, BN at a time.
    """
    columns = min(_COLUMNS, pow2(channels))
    return rows * -(-channels // columns), {"BN": _STEP, "BC": columns}


def cut_contexts(contexts: int, channels: int) -> dict[str, int]:
    """Return what kernels take that have all contexts, (KP, WC) values, in a program.

    There are as few programs as instances: eight warps each, where others have four.
    """
    rows = pow2(contexts)
    columns = min(_TILE // 2 // rows, 256, pow2(channels))
    return {"KP": rows, "WN": max(1, min(16, _TILE // 2 // columns)), "WC": columns, "num_warps": 8}


def cut_instances(
    x: Tensor, columns: int, components: int = 1
) -> tuple[int, tuple[int, ...], dict[str, int]]:
    """Return how many programs share the channels of x, their numbers, and their constants.

    One has BC channels, no more than so many columns, and walks all instances, BN at a time, and
    their parts, SB at a time; N, C, M, S and PART are the numbers.
    """
    p = plan(x)
    instances, channels, _ = p.shape
    some, narrow = min(pow2(p.splits), 32), min(columns, pow2(channels))
    rows = min(64 // some, 1024 // (pow2(components) * narrow), pow2(instances))
    blocks = {"SB": some, "BN": rows, "BC": narrow}
    return -(-channels // narrow), (*p.shape, p.splits, p.part), blocks
