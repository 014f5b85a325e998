"""Which tensors of a model changed since its conversion, which reads a little of each only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.saving.fingerprint import ODD, as_integers, read_sums

# A prime: of up to as many rows, columns or channels of a tensor, each holds one of the elements.
_SPREAD = 1021


class Mark(NamedTuple):
    """What is remembered of a tensor.

    Attributes:
        sample: of `samples`.
        tensor: its id.
        writes: how often torch had written to it.
    """

    sample: int
    tensor: int
    writes: int


@torch.no_grad()
def samples(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return a checksum of 1,021 elements of each tensor, at even distances; of all if it has less.

    It is ``sum_i i p b_i`` modulo 2^64, p odd, over their bits b.
    """
    places: dict[Any, Tensor] = {}  # of tensors of a size; those of a model have few sizes
    sums = []
    for tensor in tensors.values():
        bits, device = as_integers(tensor), tensor.device
        size = bits.numel()
        if (size, device) not in places:
            steps = torch.arange(min(size, _SPREAD), device=device)
            places[size, device] = steps * size // max(len(steps), 1)
            places.setdefault(device, torch.arange(1, _SPREAD + 1, device=device) * ODD)
        taken = torch.take(bits, places[size, device])
        sums.append((taken * places[device][: len(taken)]).sum())
    return read_sums(tensors, sums)


def mark(tensors: dict[str, Tensor]) -> dict[str, Mark]:
    """Return what tells later whether a tensor changed; nothing for tensors without values."""
    if any(t.is_meta for t in tensors.values()):
        return {}
    found = samples(tensors)
    writes = {n: 0 if t.is_inference() else t._version for n, t in tensors.items()}
    return {name: Mark(found[name], id(t), writes[name]) for name, t in tensors.items()}


def find_changed(tensors: dict[str, Tensor], marks: dict[str, Mark]) -> set[str]:
    """Return the names of the tensors that are not as they were marked.

    One is changed if its sample is another; or, if the sample is a part of it only, if torch has
    written to it more often than to the others: DistributedDataParallel and ``load_state_dict``
    write to all of them, even what they hold. Copies of a model count anew, and writes through
    ``.data`` or NumPy are not counted; of these a sample may miss a few numbers in a large tensor.
    """
    now = mark(tensors)
    more = {
        name: now[name].writes - before.writes
        for name, before in marks.items()
        if name in now and now[name].tensor == before.tensor and tensors[name].numel() > _SPREAD
    }
    least = min(more.values(), default=0)
    return {
        name
        for name, found in now.items()
        if name not in marks or found.sample != marks[name].sample or more.get(name, least) > least
    }
