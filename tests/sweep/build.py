"""Build a model with seeded random weights in which no error can hide, quickly and small."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

# Matrices and filters above this size are filled by `fill` alone, not by the model's own
# initialisation, which takes longer than everything else for large models.
LARGE = 4096
_FILLS = {
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.normal_, nn.init.uniform_),
    *(nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.trunc_normal_),
}


def is_large(parameter: Tensor) -> bool:
    """Say whether a parameter is filled by `fill` alone."""
    return parameter.dim() > 1 and parameter.numel() > LARGE


class SkipFills(TorchFunctionMode):
    """Leave large parameters without values while a model is built."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, nn.Parameter) and is_large(target):
                return target
        return func(*args, **kwargs)


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a batch or instance norm, frozen ones of libraries included."""
    frozen = type(module).__name__.endswith(("FrozenBatchNorm2d", "FrozenBatchNormAct2d"))
    return isinstance(module, _NormBase) or frozen


def count(model: nn.Module) -> dict[str, int]:
    """Count the parameters and the batch and instance norms of a model."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "norms": sum(map(is_norm, model.modules())),
    }


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build without values, whatever the size."""
    with torch.device("meta"):
        return build().eval()


def build_filled(
    build: Callable[[], nn.Module], name: str, seed: int, dtype: torch.dtype, keep: int
) -> nn.Module:
    """Build a model in eval mode, of repeated blocks only `keep` unless 0, with random weights."""
    torch.manual_seed(seed + zlib.crc32(name.encode()))
    with SkipFills():
        model = build().eval()
    if keep:
        trim_repeats(model, keep)
    fill(model)
    return model.to(dtype)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter random values.

    Constant ones, as zero-initialised branches and layer scales of 1e-6, would hide errors.
    """
    norms = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if is_large(parameter):
            bound = math.sqrt(3 / max(parameter[0].numel(), 1))
            parameter.uniform_(-bound, bound)
        elif id(parameter) in norms:
            is_bias = name.endswith("bias")
            parameter.normal_(0, 0.2) if is_bias else parameter.uniform_(0.5, 1.5)
        elif bool((parameter == parameter.flatten()[0]).all()):
            is_zero = float(parameter.flatten()[0]) == 0
            parameter.normal_(0, 0.05) if is_zero else parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if is_norm(module) and isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Set running statistics near those of a batch: signals neither die nor explode.

    The run is one in training mode, so it also tells whether the inputs are fit for that.
    """
    tracked = [
        m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None
    ]
    kept = [norm.momentum for norm in tracked]
    model.train()
    try:
        for norm in tracked:
            norm.momentum = 1.0
        run(model)
    finally:
        model.eval()
        for norm, momentum in zip(tracked, kept, strict=True):
            norm.momentum = momentum
    for norm in tracked:
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
        norm.running_var.clamp_(min=1e-3)


def trim_repeats(model: nn.Module, keep: int) -> int:
    """Keep so many of each run of consecutive blocks of one class and one set of shapes.

    Returns:
        How many blocks were removed.
    """
    removed = 0
    for module in list(model.modules()):
        if type(module) not in (nn.Sequential, nn.ModuleList):
            continue
        children = list(module.children())
        kept = [c for _, run in itertools.groupby(children, _signature) for c in list(run)[:keep]]
        if len(kept) < len(children):
            names = list(module._modules)
            for name in names[len(kept) :]:
                del module._modules[name]
            # Named children keep the leading names: code may look them up.
            module._modules.update(dict(zip(names, kept, strict=False)))
            removed += len(children) - len(kept)
    return removed


def _signature(module: nn.Module) -> Any:
    shapes = [(name, tuple(t.shape)) for name, t in module.state_dict(keep_vars=True).items()]
    return (type(module), tuple(shapes)) if shapes else id(module)


@contextmanager
def fixed_norms(pairs: list[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Run other functions in place of the forwards of norms, the model's own code around them."""
    for norm, function in pairs:
        norm.__dict__["forward"] = function
    try:
        yield
    finally:
        for norm, _ in pairs:
            norm.__dict__.pop("forward", None)
