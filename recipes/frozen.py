"""Methods called NAME-frozen: as NAME, but statistics stay those the weights came with.

Training then normalises as evaluation does, and learns the affine (of `cn`, one a context). What
such a row gains on NAME comes of doing without batch statistics; what `cn-frozen` gains on
`bn-frozen` comes of contexts.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

from .training import takes_context

SUFFIX = "-frozen"


def suffixed(method: str) -> str:
    """Give the name of a method with frozen statistics."""
    return method + SUFFIX


def name_of(method: str) -> str:
    """Give the method that this one is but for its statistics."""
    return method.removesuffix(SUFFIX)


def freeze_if_asked(method: str, model: nn.Module) -> nn.Module:
    """Make every norm keep and use its running statistics in training, if the method says so."""
    if not method.endswith(SUFFIX):
        return model
    if takes_context(model):
        normswap.freeze(model, train="all", stats="frozen")
        return model
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.register_forward_pre_hook(lambda norm, _: norm.train(False) and None)
    return model
