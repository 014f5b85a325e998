"""Read normalisation layers into `Site`s: which classes are norms, and what each one states."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.util.arguments import as_count, describe
from normswap.util.changed_norms import (
    STATISTICS,
    TENSORS,
    changed_by,
    computed_tensor,
    is_torchs,
    norm_tensors,
    odd_tensor,
    qualified,
)
from normswap.util.measure_eps import measure_eps

# Classes of libraries this package does not import, by qualified name; each computes batch norm,
# then its children `drop` and `act`.
_FUSED = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}
# Batch norm with every tensor a buffer: torchvision, timm, detectron2 and DETR each have one.
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
# A normal distribution (gpytorch's LogNormalPrior) is no norm.
_NAMED = re.compile("Norm(?!al(?!i[sz]))")
_DIMS = {"1d": (2, 3), "2d": (4,), "3d": (5,)}


@dataclass(frozen=True)
class Site:
    """A normalisation layer of a model, and what it takes to build its replacement.

    Attributes:
        fqn: its first qualified name; "" where it is the model itself.
        aliases: every further name of the same module object.
        source: its class name.
        kind: "batch" or "instance".
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None is cumulative.
        affine: whether it has a weight or a bias.
        tracked: whether it has running statistics.
        frozen: whether it never updates them, nor its affine (FrozenBatchNorm2d).
        synced: whether it shares batch statistics between processes (SyncBatchNorm).
        dims: the numbers of dimensions its input may have; () for any.
        fused: names of the children it applies after normalising.
        device, dtype: where and in what its replacement is allocated.
    """

    fqn: str
    source: str
    kind: Literal["batch", "instance"]
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    tracked: bool
    device: torch.device
    dtype: torch.dtype
    frozen: bool = False
    synced: bool = False
    dims: tuple[int, ...] = ()
    fused: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a layer is inserted.

    Attributes:
        fqn: qualified name of the norm, of the residual block's container, or "" for the input.
        placement: "norm", "output", "pre", "residual", "identity", "post" or "input".
        channels: C there; None where no layer around tells.
        device, dtype: where and in what a layer is allocated.
        block: which residual add of the container.
        blocks: how many residual adds the container has.
        before: whether the layer comes before the norm (after an instance norm every channel's
            statistics are constant).
        reason: how the place was recognised.
    """

    fqn: str
    placement: str
    channels: int | None
    device: torch.device
    dtype: torch.dtype
    block: int = 0
    blocks: int = 0
    before: bool = False
    reason: str = ""


def _forward_owner(module: nn.Module) -> type:
    """Return the class whose forward runs; an override below a known norm is unknown code."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def looks_like_norm(module: nn.Module) -> bool:
    """Return whether a module is some normalisation layer, by base class, buffers or name."""
    if isinstance(module, _NormBase) or set(TENSORS).issubset(module._buffers.keys()):
        return True
    name = type(module).__name__
    leaf = next(module.children(), None) is None
    return name.endswith(_FROZEN) or (leaf and (bool(_NAMED.search(name)) or name.endswith("BN")))


def unknown_norm(module: nn.Module) -> str:
    """Say why a module that is called a norm is not replaced; other libraries have such names."""
    name = type(module).__name__
    if set(TENSORS).issubset(module._buffers.keys()):
        return f"it has the buffers of a frozen batch norm, but its class, {name}, is not known"
    return f"{name} is neither a batch nor an instance norm of torch, torchvision or timm"


def read_site(
    fqn: str, module: nn.Module, aliases: tuple[str, ...] = (), like: Tensor | None = None
) -> Site | str:
    """Read a normalisation layer.

    Args:
        fqn: its qualified name.
        module: the layer.
        aliases: its further names.
        like: a tensor whose device and dtype hold where the layer has no tensor of its own.

    Returns:
        The site, or the reason why its function is not one that can be preserved.
    """
    name = type(module).__name__
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized; remove the parametrization first"
    if computed := computed_tensor(module, TENSORS):
        usual = "buffer" if computed in STATISTICS else "parameter"
        return f"its {computed} is computed from other tensors; make it a {usual} first"
    tensors, frozen = norm_tensors(module), name.endswith(_FROZEN)
    odd = odd_tensor(tensors) if frozen or isinstance(module, _NormBase) else unknown_norm(module)
    if odd:
        return odd
    if frozen:
        return _read_frozen(fqn, module, aliases)
    assert isinstance(module, _NormBase)
    owner = _forward_owner(module)
    fused = qualified(owner) in _FUSED
    if not fused and owner not in (_BatchNorm, nn.SyncBatchNorm, _InstanceNorm):
        # By its full name: a library's own class is often called as torch's.
        return (
            f"{qualified(owner)} overrides the forward of its base class, so its function is "
            "unknown; a torch norm inside of a module that does the rest is replaced"
        )
    if not fused and (change := changed_by(type(module))):
        return f"{change}; use torch's own norm, and set modes and values from outside"
    kind: Literal["batch", "instance"] = (
        "instance" if isinstance(module, _InstanceNorm) else "batch"
    )
    tracked = "running_mean" in tensors
    momentum = module.momentum if module.momentum is None else float(module.momentum)
    if tracked and not module.track_running_stats:  # set after construction
        # A batch norm still uses the statistics in eval, but never moves them; an instance norm
        # never uses them.
        tracked, momentum = kind == "batch", 0.0
    if kind == "batch" and not tracked:
        return "track_running_stats=False: there are no running statistics to start from"
    own = next(iter(tensors.values()), torch.empty(0))
    like = own if like is None or own.numel() else like
    channels = norm_channels(module)
    if channels is None:
        return f"its num_features is {describe(module.num_features)}, no count"
    base = next((c.__name__ for c in type(module).__mro__ if c.__name__[-2:] in _DIMS), "")
    dims = _DIMS.get(base[-2:], ())
    if kind == "instance":  # it also takes one dimension fewer, an input without a batch
        dims = dims[-1:]
    # A check of its own may take other inputs than the base class does.
    own_check = kind == "batch" and not is_torchs(type(module)._check_input_dim)
    return Site(
        fqn=fqn,
        aliases=aliases,
        source=name,
        kind=kind,
        num_features=channels,
        eps=float(module.eps),
        momentum=momentum,
        affine=any(name not in STATISTICS for name in tensors),
        tracked=tracked,
        device=like.device,
        dtype=like.dtype,
        synced=isinstance(module, nn.SyncBatchNorm),
        dims=() if own_check or isinstance(module, nn.SyncBatchNorm) else dims,
        fused=("drop", "act") if fused else (),
    )


def _read_frozen(fqn: str, module: nn.Module, aliases: tuple[str, ...]) -> Site | str:
    tensors = norm_tensors(module)
    if len(tensors) < len(TENSORS):
        return "a frozen batch norm without the usual weight, bias, running_mean, running_var"
    fused = tuple(n for n in ("drop", "act") if isinstance(getattr(module, n, None), nn.Module))
    eps = measure_eps(module, fused)
    if isinstance(eps, str):
        return eps
    mean = tensors["running_mean"]
    return Site(
        fqn=fqn,
        aliases=aliases,
        source=type(module).__name__,
        kind="batch",
        num_features=mean.shape[0],
        eps=eps,
        momentum=0.1,
        affine=True,
        tracked=True,
        device=mean.device,
        dtype=mean.dtype,
        frozen=True,
        dims=(4,),
        fused=fused,
    )


def norm_channels(module: nn.Module) -> int | None:
    """Return the channels of a batch or instance norm, None for other modules."""
    if not (isinstance(module, _NormBase) or type(module).__name__.endswith(_FROZEN)):
        return None
    # By its tensors, as torch's forward goes: what cut channels out of them may have left the rest.
    lengths = (t.numel() for t in norm_tensors(module).values())
    return next(lengths, as_count(getattr(module, "num_features", None)))


def is_instance_norm(module: nn.Module) -> bool:
    """Return whether a module normalises each instance by itself."""
    return isinstance(module, _InstanceNorm)


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Yield (first name, module, further names) for every normalisation layer, in model order."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in modules or looks_like_norm(module):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    for key, module in modules.items():
        first, *rest = names[key]
        yield first, module, tuple(rest)
