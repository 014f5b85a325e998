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


def base_of(method: str) -> str:
    """Give the method that this one is but for its statistics."""
    return method.removesuffix(FROZEN)


def convert(
    model: nn.Module, method: str, contexts: Sequence[str] | int | None, **settings: Any
) -> nn.Module:
    """Convert a model; as long as it is not trained, it computes the same function."""
    name, variant = VARIANTS.get(base_of(method), (base_of(method), {}))
    if name in normswap.methods():
        early = after_early_stages(model) if name == "mixstyle" else {}
        told = contexts if normswap.get_method(name).needs_context else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdviceWarning)  # what it advises is what is compared
            model = normswap.convert(model, name, contexts=told, **{**variant, **early, **settings})
    if method.endswith(FROZEN) and takes_context(model):
        normswap.freeze(model, train="all", stats="frozen")
    elif method.endswith(FROZEN):
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.register_forward_pre_hook(lambda norm, _: norm.train(False) and None)
    return model


def after_early_stages(model: nn.Module) -> dict[str, Any]:
    """Give where MixStyle's authors have it: after layer1 and layer2 of a ResNet."""
    stages = [i["module"] for i in getattr(model, "feature_info", ()) if i["reduction"] in (4, 8)]
    expected = "expected a timm model with stages of reduction 4 and 8 for mixstyle"
    check(stages, f"{expected}, got {type(model).__name__}; leave mixstyle out of --methods")
    return {"placement": "output", "select": stages}
