"""What a norm was before a layer replaced it, and how the layer becomes that norm again."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, NormswapError
from normswap.methods.base import Contexts, Method
from normswap.methods.layer import ContextLayer, NormLayer
from normswap.methods.norm_values import PlainNorm
from normswap.sites import Site
from normswap.util.arguments import describe
from normswap.util.distributed import find_group, group_name
from normswap.util.original_class import ORIGINAL

_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass
class Original:
    """A norm that was replaced: its class, settings and values, but no module.

    The values take 4 C numbers on the CPU; they make going back exact where nothing was learned.

    Attributes:
        cls: its class.
        site: as it was read.
        settings: its plain attributes, hooks among them.
        adopted: names of those that the layer carried on; a change made there since then counts.
        parameters: its parameters by name, None where it lacks one.
        buffers: its buffers by name, likewise.
        modules: its children, but for those the layer applies itself.
        group: name of its process group, if it has one.
    """

    cls: type[nn.Module]
    site: Site
    settings: dict[str, Any]
    adopted: frozenset[str]
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    modules: dict[str, nn.Module | None]
    group: str | None


def make_layer(
    method: Method, site: Site, source: nn.Module, contexts: Contexts, options: Any
) -> nn.Module:
    """Return what a method builds for a norm, checked, before it takes over anything else.

    Raises:
        ConversionError: it is no new layer, or none that takes the context its method needs; or
            `build` raised an error, of which this tells the norm.
    """
    try:
        # A norm without values has none to copy into a layer on another device.
        with torch.device("meta") if site.device.type == "meta" else nullcontext():
            layer = method.build(site, source, contexts, options)
    except NormswapError:
        raise
    except Exception as error:
        raise ConversionError(
            f"method {method.name!r} cannot build a layer for {site.fqn!r}, a "
            f"{type(source).__name__}: {type(error).__name__}: {error}; where it is not meant for "
            "such norms, its refuse(site) says so"
        ) from error
    if not isinstance(layer, nn.Module) or layer is source:
        raise ConversionError(
            f"method {method.name!r}: expected build() to return a new module for {site.fqn!r}, "
            f"got {'the norm itself' if layer is source else describe(layer)}"
        )
    if method.needs_context:
        if not isinstance(layer, ContextLayer):
            raise ConversionError(
                f"method {method.name!r}: expected a subclass of ContextLayer for {site.fqn!r}, to "
                f"which labels are handed, got {type(layer).__name__}; without labels, set "
                "needs_context = False"
            )
        layer.names, layer.answering = contexts.names, contexts.answering
    elif not isinstance(layer, NormLayer):
        layer.to(site.device, site.dtype)
    return layer


def remember_original(layer: nn.Module, source: nn.Module, site: Site) -> None:
    """Keep in a layer what it replaced."""
    settings = {k: v for k, v in vars(source).items() if k not in _TABLES}
    if "process_group" in settings:
        settings["process_group"] = None  # can be neither copied nor pickled; its name can
    layer.__dict__[ORIGINAL] = Original(
        cls=type(source),
        site=site,
        settings=settings,
        adopted=frozenset(k for k, v in settings.items() if vars(layer).get(k, settings) is v),
        parameters={k: _copy(v) for k, v in source._parameters.items()},
        buffers={k: _copy(v) for k, v in source._buffers.items()},
        modules={k: v for k, v in source._modules.items() if k not in site.fused},
        group=group_name(source),
    )


def original_of(layer: nn.Module) -> Original | None:
    """Return what a layer replaced, None for other modules."""
    return vars(layer).get(ORIGINAL)


def _original(layer: nn.Module) -> Original:
    original: Original = vars(layer)[ORIGINAL]
    return original


def _copy(value: Tensor | None) -> Tensor | None:
    if value is None or value.is_meta:
        return None if value is None else value.detach()
    return value.detach().to("cpu", copy=True)


def rebuild(layer: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Return the norm that a layer replaced, with the values it had then.

    Its mode, hooks, dtype, what is frozen and, by default, its device are the layer's.
    """
    original = _original(layer)
    norm = original.cls.__new__(original.cls)
    nn.Module.__init__(norm)
    for name, value in original.settings.items():
        norm.__dict__[name] = vars(layer).get(name, value) if name in original.adopted else value
    if original.group is not None:
        norm.__dict__["process_group"] = find_group(original.group)
    place = _placement(layer, original.site, device)
    for name, value in original.parameters.items():
        required = value is not None and value.is_floating_point() and _requires_grad(layer, name)
        norm._parameters[name] = None if value is None else nn.Parameter(place(value), required)
    buffers = original.buffers.items()
    norm._buffers.update({n: None if value is None else place(value) for n, value in buffers})
    norm._modules.update({n: layer._modules[n] for n in original.site.fused} | original.modules)
    return norm


def _placement(
    layer: nn.Module, site: Site, device: torch.device | None
) -> Callable[[Tensor], Tensor]:
    """Return a function that puts a tensor where the layer is now, in its dtype if that changed."""
    tensors = (*layer.parameters(), *layer.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    dtype = None if like.dtype == site.dtype else like.dtype

    def place(value: Tensor) -> Tensor:
        if value.is_meta:  # it had no values at conversion
            return torch.empty_like(value, device=device or like.device, dtype=dtype or value.dtype)
        to = dtype if value.is_floating_point() else None
        return value.to(device=device or like.device, dtype=to, copy=True)

    return place


def _requires_grad(layer: nn.Module, name: str) -> bool:
    own = layer._parameters.get(name)
    given = layer.parameters(recurse=False) if own is None else (own,)
    return any(p.requires_grad for p in given)


def lacks_values(layer: nn.Module) -> bool:
    """Return whether the norm that a layer replaced was on the meta device, without values."""
    original = _original(layer)
    kept = (*original.parameters.values(), *original.buffers.values())
    return any(value is not None and value.is_meta for value in kept)


def is_untouched(layer: nn.Module, method: Method, contexts: Contexts, options: Any) -> bool:
    """Return whether a layer is, bit for bit, what conversion makes of the norm it replaced."""
    own = _tensors(layer)
    if any(t.is_meta for t in own.values()):
        return True
    if lacks_values(layer):
        return False
    original = _original(layer)
    dtype = next((t.dtype for t in own.values() if t.is_floating_point()), original.site.dtype)
    # Where conversion computed: logarithms of another device may differ in the last bit.
    there = original.site.device
    gone = there.type == "meta" or (there.type == "cuda" and not torch.cuda.is_available())
    device = torch.device("cpu") if gone else there
    site = replace(original.site, device=device, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        made = make_layer(method, site, rebuild(layer, device), contexts, options)
    eps = vars(made).get("eps", original.site.eps)
    if vars(layer).get("eps", eps) != eps:
        return False  # set since, and the norm takes it, while not every layer uses its own
    fresh = _tensors(made)
    return fresh.keys() == own.keys() and all(
        t.shape == own[name].shape and torch.equal(t, own[name].to(device))
        for name, t in fresh.items()
    )


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer, without those of the children it took over."""
    original = original_of(layer)
    fused = () if original is None else tuple(f"{name}." for name in original.site.fused)
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: t.detach() for name, t in named if not name.startswith(fused)}


@torch.no_grad()
def write(norm: nn.Module, plain: PlainNorm, layer: nn.Module) -> None:
    """Give a rebuilt norm the values of a plain one, and the layer's eps.

    A norm without weight and bias gets them where they are needed.
    """
    affine = {"weight": plain.weight, "bias": plain.bias}
    missing = [name for name in affine if getattr(norm, name, None) is None]
    like = next(t for t in (*layer.parameters(), plain.weight) if t.is_floating_point())
    rounding = 8 * torch.finfo(like.dtype).eps
    if any(bool(((affine[n] - float(n == "weight")).abs() > rounding).any()) for n in missing):
        for name in missing:
            tensor = affine[name].to(like.device, like.dtype, copy=True)
            setattr(norm, name, nn.Parameter(tensor, _requires_grad(layer, name)))
        norm.__dict__["affine"] = True
    statistics = {"running_mean": plain.mean, "running_var": plain.var}
    for name, value in (affine | statistics | {"num_batches_tracked": plain.batches}).items():
        slot = getattr(norm, name, None)
        if slot is not None and value is not None:
            slot.copy_(value)
