"""What tells one model from another, and what of a model changed: names, shapes, checksums."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.lifecycle.record import method_layers, replaced_layers
from normswap.lifecycle.replaced_norm import rebuild
from normswap.util.original_class import container_class

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A prime, so that no axis of a weight repeats with it; each of up to as many rows, columns or
# channels holds one of as many elements, evenly spread.
_PRIME = 1021
_SHOWN = 6
ODD = 0x9E3779B97F4A7C1


def named_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters and the buffers that a state dict would hold, by first name."""
    temporary = {
        f"{name}.{buffer}".lstrip(".")
        for name, part in module.named_modules()
        for buffer in part._non_persistent_buffers_set
    }
    named = (*module.named_parameters(), *module.named_buffers())
    return {f"{prefix}{name}": t for name, t in named if name not in temporary}


def layer_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the layers of a converted model's method."""
    found: dict[str, Tensor] = {}
    for name, layer in method_layers(root).items():
        found |= named_tensors(layer, f"{name}." if name else "")
    return found


def other_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a converted model that are not of its method's layers."""
    return _without(named_tensors(root), method_layers(root).values())


def _without(tensors: dict[str, Tensor], layers: Iterable[nn.Module]) -> dict[str, Tensor]:
    own = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    return {name: t for name, t in tensors.items() if id(t) not in own}


@torch.no_grad()
def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return a checksum of the bits of each tensor, the same on every device.

    One pass. Training, another seed or another file change it; it is
    no protection against intent.
    """
    return read_sums(tensors, [_checksum(t) for t in tensors.values()])


def read_sums(names: Iterable[str], sums: list[Tensor]) -> dict[str, int]:
    """Return numbers of several devices by name, with one wait for each device."""
    devices = {s.device for s in sums}
    by_device = {d: iter(torch.stack([s for s in sums if s.device == d]).tolist()) for d in devices}
    return {name: next(by_device[s.device]) for name, s in zip(names, sums, strict=True)}


def _checksum(tensor: Tensor) -> Tensor:
    """Return ``sum_i (i mod 1021 + 1) p b_i`` modulo 2^64, p odd, over the bits b as int64.

    What is left of a row of 1021, or of 8 bytes, fills the first columns.
    """
    flat = as_integers(tensor).contiguous().flatten()
    each = 8 // flat.element_size()
    if flat.storage_offset() % each:
        flat = flat.clone()
    whole = len(flat) - len(flat) % (each * _PRIME)
    columns = flat[:whole].view(torch.int64).view(-1, _PRIME).sum(0)
    rest = flat[whole:].to(torch.int64)
    for part in torch.split(rest, _PRIME):
        columns[: len(part)] += part
    weights = torch.arange(1, _PRIME + 1, device=tensor.device) * ODD
    return (columns * weights).sum()


def as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of each number of a tensor as an integer of its size."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()])


def describe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the dtype and shape of each tensor, as JSON takes them."""
    return {name: [str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()}


def describe_original(root: nn.Module) -> dict[str, Any]:
    """Return the architecture that a converted model was made from."""
    norms = {name: rebuild(layer) for name, layer in replaced_layers(root).items()}
    return _describe(container_class(root), norms, other_tensors(root))


def describe_base(base: nn.Module, norms: list[str]) -> dict[str, Any]:
    """Return the same of a model that is not converted, whose norms of these names will be."""
    modules = dict(base.named_modules())
    found = {name: modules[name] for name in norms if name in modules}
    return _describe(type(base), found, _without(named_tensors(base), found.values()))


def _describe(cls: type, norms: dict[str, nn.Module], others: dict[str, Tensor]) -> dict[str, Any]:
    if "" in norms:
        cls = type(norms[""])
    return {
        "class": cls.__name__,
        "norms": {
            name: {"class": type(norm).__name__, "tensors": describe(named_tensors(norm))}
            for name, norm in norms.items()
        },
        "tensors": describe(others),
    }


def differences(saved: Any, found: Any) -> list[str]:
    """Return how a model differs from the one that was saved, a line for each name."""
    lines = []
    if saved["class"] != found["class"]:
        lines.append(f"the model is a {saved['class']} there, a {found['class']} here")
    for what in ("norms", "tensors"):
        there, here = saved[what], found[what]
        lines += [f"{name}: not in this model" for name in there if name not in here]
        lines += [f"{name}: not in the saved one" for name in here if name not in there]
        lines += [
            f"{name}: {_short(there[name])} there, {_short(here[name])} here"
            for name in there
            if name in here and there[name] != here[name]
        ]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{name} {_short(tensor)}" for name, tensor in value["tensors"].items())
        return f"{value['class']}({', '.join(parts)})"
    dtype, shape = value
    return f"{dtype} {tuple(shape)}"


def shorten(lines: list[str]) -> str:
    """Join lines for a message, the first few."""
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


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
            steps = torch.arange(min(size, _PRIME), device=device)
            places[size, device] = steps * size // max(len(steps), 1)
            places.setdefault(device, torch.arange(1, _PRIME + 1, device=device) * ODD)
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
        if name in now and now[name].tensor == before.tensor and tensors[name].numel() > _PRIME
    }
    least = min(more.values(), default=0)
    return {
        name
        for name, found in now.items()
        if name not in marks or found.sample != marks[name].sample or more.get(name, least) > least
    }
