"""The methods that recipes compare: normswap's, models as they are, and NAME-frozen.

NAME-frozen is as NAME, but statistics stay those the weights came with. Training then normalises as
evaluation does, and learns the affine (of `cn`, one a context). What such a row gains on NAME comes
of doing without batch statistics; what `cn-frozen` gains on `bn-frozen` comes of contexts.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.errors import AdviceWarning

from .errors import check
from .training import takes_context

FROZEN = "-frozen"
# Settings of a method that recipes know by a name of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cn-first": ("cn", {"select": "first"}),
    "cn-shared": ("cn", {"affine": "shared"}),
    "cn-x-batch": ("cn-x", {"statistics": "batch"}),
}
# What `python -m recipes NAME --help` says of those that a recipe compares.
TEXTS = {
    "bn": "the network as it is, with BatchNorm",
    "cn": "statistics, scale and shift of each context's own in every norm",
    "cn-first": 'these at the first norm alone (`select="first"`)',
    "cn-shared": 'statistics of each context\'s own, one scale and shift (`affine="shared"`)',
    "cn-x": "a learned mean and spread for each context, no statistics of the batch",
    "cn-x-batch": 'BatchNorm, then such a mean and spread (`statistics="batch"`)',
    "acn": "a mixture of Gaussians for each channel, learned; it is told no context",
    "bn-frozen": "bn with the statistics that it starts with, as evaluation has them",
    "cn-frozen": "cn likewise: what it gains on bn-frozen comes of contexts",
}
# Reductions of the stages after which authors have their augmentations; 2 is that of the stem.
STAGES = {"mixstyle": (4, 8), "efdmix": (4, 8), "dsu": (2, 4, 8, 16, 32)}


def known() -> tuple[str, ...]:
    """Give the names of all that `convert` knows, bn first."""
    names = ("bn", *normswap.methods(), *VARIANTS)
    return (*names, *(f"{name}{FROZEN}" for name in names))


def base_of(method: str) -> str:
    """Give the method that this one is but for its statistics."""
    return method.removesuffix(FROZEN)


def convert(
    model: nn.Module, method: str, contexts: Sequence[str] | int | None, **settings: Any
) -> nn.Module:
    """Convert a model; as long as it is not trained, it computes the same function."""
    name, variant = VARIANTS.get(base_of(method), (base_of(method), {}))
    if name in normswap.methods():
        placed = after_stages(model, name) if name in STAGES else {}
        told = contexts if normswap.get_method(name).needs_context else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdviceWarning)  # what it advises is what is compared
            settings = {**variant, **placed, **settings}
            model = normswap.convert(model, name, contexts=told, **settings)
    if method.endswith(FROZEN) and takes_context(model):
        normswap.freeze(model, train="all", stats="frozen")
    elif method.endswith(FROZEN):
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.register_forward_pre_hook(lambda norm, _: norm.train(False) and None)
    return model


def after_stages(model: nn.Module, method: str) -> dict[str, Any]:
    """Give where its authors have an augmentation of style: after stages of a timm model."""
    found, parts = list[str](), dict(model.named_modules())
    for path, part in parts.items():
        stages = getattr(part, "feature_info", ())
        stages = getattr(stages, "info", stages)
        if isinstance(stages, Sequence) and not found:  # blocks have a method of that name
            prefix = path and f"{path}."
            found = [prefix + s["module"] for s in stages if s["reduction"] in STAGES[method]]
            found = [stage for stage in found if stage in parts]  # some leave the last ones out
    expected = f"expected a timm model with stages of reduction 4 and 8 for {method}"
    check(found, f"{expected}, got {type(model).__name__}; leave {method} out of --methods")
    return {"placement": "output", "select": found}
