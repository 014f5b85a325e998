"""What tells one model from another: names, shapes and dtypes, and a checksum of each tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.lifecycle.original import rebuild
from normswap.lifecycle.record import inserted_layers, method_layers, replaced_layers
from normswap.util.original_class import container_class

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 1021  # a prime, so that no axis of a weight repeats with it
_SHOWN = 6


def named_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters and the buffers that a state dict would hold, by first name."""
    temporary = {
        f"{name}.{buffer}".lstrip(".")
        for name, part in module.named_modules()
        for buffer in part._non_persistent_buffers_set
    }
    named = (*module.named_parameters(), *module.named_buffers())
    return {f"{prefix}{name}": t.detach() for name, t in named if name not in temporary}


def layer_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the layers of a converted model's method."""
    found: dict[str, Tensor] = {}
    for name, layer in method_layers(root).items():
        found |= named_tensors(layer, f"{name}." if name else "")
    return found


def other_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a converted model that are not of its method's layers."""
    own = set(map(id, _all(method_layers(root).values())))
    return {name: t for name, t in named_tensors(root).items() if id(_find(root, name)) not in own}


def _all(layers: Any) -> list[Tensor]:
    return [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]


def _find(root: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)


def checksums(tensors: dict[str, Tensor]) -> dict[str, int] | None:
    """Return a checksum of the bits of each tensor, the same on every device; None without values.

    One pass and one wait for the device. Training, another seed or another file change it; it is
    no protection against intent.
    """
    if any(t.is_meta for t in tensors.values()):
        return None
    sums = [_checksum(t) for t in tensors.values()]
    devices = {s.device for s in sums}
    by_device = {d: iter(torch.stack([s for s in sums if s.device == d]).tolist()) for d in devices}
    return {name: next(by_device[s.device]) for name, s in zip(tensors, sums, strict=True)}


def _checksum(tensor: Tensor) -> Tensor:
    """Return ``sum_i (i mod 1021 + 1) p b_i`` modulo 2^64, p odd, over the bits b as int64.

    What is left of a row of 1021, or of 8 bytes, fills the first columns.
    """
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().flatten()
    each = 8 // flat.element_size()
    if flat.storage_offset() % each:
        flat = flat.clone()
    whole = len(flat) - len(flat) % (each * _COLUMNS)
    columns = flat[:whole].view(torch.int64).view(-1, _COLUMNS).sum(0)
    rest = flat[whole:].view(_INTEGERS[flat.element_size()]).to(torch.int64)
    for part in torch.split(rest, _COLUMNS):
        columns[: len(part)] += part
    weights = torch.arange(1, _COLUMNS + 1, device=tensor.device) * 0x9E3779B97F4A7C1
    return (columns * weights).sum()


def describe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the dtype and shape of each tensor, as JSON takes them."""
    return {name: [str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()}


def describe_original(root: nn.Module) -> dict[str, Any]:
    """Return the architecture that a converted model was made from."""
    norms = {name: rebuild(layer) for name, layer in replaced_layers(root).items()}
    own = set(map(id, _all([*replaced_layers(root).values(), *inserted_layers(root).values()])))
    others = {n: t for n, t in named_tensors(root).items() if id(_find(root, n)) not in own}
    return _describe(container_class(root), norms, others)


def describe_base(base: nn.Module, norms: list[str]) -> dict[str, Any]:
    """Return the same of a model that is not converted, whose norms of these names will be."""
    modules = dict(base.named_modules())
    found = {name: modules[name] for name in norms if name in modules}
    own = set(map(id, _all(found.values())))
    others = {n: t for n, t in named_tensors(base).items() if id(_find(base, n)) not in own}
    return _describe(type(base), found, others)


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
