"""What a layer takes over from the norm it replaces, whatever a method's `build` returns."""

from functools import partial
from typing import Any

from torch import nn

from normswap.methods.layer import NormLayer
from normswap.sites import Site
from normswap.util.distributed import group_name

# What code that reads a norm may ask of it; the answer is that of the norm replaced.
_SETTINGS = ("affine", "track_running_stats")
_NEW = frozenset(vars(nn.Module()))
_HOOKS = sorted(name for name in _NEW if "hook" in name)


def adopt(layer: nn.Module, source: nn.Module, site: Site) -> None:
    """Carry over mode, hooks, freezing, fused children, settings and further attributes."""
    layer.train(bool(source.training))
    _keep_requires_grad(layer, source, site)
    _apply_fused(layer, source, site)
    if isinstance(layer, NormLayer):
        layer.site, layer.dims = site.fqn, site.dims
    if hasattr(layer, "frozen"):
        layer.frozen = site.frozen  # type: ignore[assignment]
    if hasattr(layer, "synced"):
        group = group_name(source) if site.synced else None
        layer.__dict__.update(synced=site.synced, process_group=group)
    for name in _HOOKS:
        own, carried = vars(layer)[name], vars(source)[name]
        if own and carried:
            own.update(carried)
        elif not own:  # the same dict, so that the handle of a hook still removes it
            layer.__dict__[name] = carried
    for name, value in vars(source).items():
        unknown = name not in _NEW and not hasattr(layer, name)
        if name in _SETTINGS or unknown:
            layer.__dict__[name] = value


def _keep_requires_grad(layer: nn.Module, source: nn.Module, site: Site) -> None:
    """Freeze what replaces a frozen weight or bias, and the whole layer where both are."""
    affine = {name: getattr(source, name, None) for name in ("weight", "bias")}
    given = {name: t.requires_grad for name, t in affine.items() if t is not None}
    if site.frozen or (given and not any(given.values())):
        layer.requires_grad_(False)
        return
    for name in given.keys() & layer._parameters.keys():
        if (parameter := layer._parameters[name]) is not None:
            parameter.requires_grad_(given[name])


def _apply_fused(layer: nn.Module, source: nn.Module, site: Site) -> None:
    """Have a layer apply the children that the norm applied after normalising."""
    for name in site.fused:
        layer.add_module(name, getattr(source, name))
    if isinstance(layer, NormLayer):
        layer.fused = site.fused
    elif site.fused:
        # A partial is copied and pickled with the layer it refers to; a closure would not be.
        layer.__dict__["forward"] = partial(_forward_fused, layer, site.fused)


def _forward_fused(layer: nn.Module, fused: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    """Stand in for the forward of a layer that knows no fused children."""
    y = type(layer).forward(layer, *args, **kwargs)
    for name in fused:
        y = layer._modules[name](y)  # type: ignore[misc]
    return y
