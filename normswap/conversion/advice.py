"""What a conversion says of a model whose batch norms were trained before."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.methods.norm_values import is_trained


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the batch norms of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def advise_freezing(converted: nn.Module, batch_norms: Iterable[str]) -> str | None:
    """Return what to say where training would move statistics that were trained before.

    It asks the layers alone that now stand where batch norms were, be they these themselves beside
    inserted layers: what was measured is how statistics of the batch disturb pretrained weights,
    whoever takes them. A layer that has none to move has no running mean.
    """
    if not any(is_trained(converted.get_submodule(name)) for name in batch_norms):
        return None
    return (
        "norms of this model were trained before, and in training take statistics of the batch: "
        "fine-tuning of pretrained weights at small rates went better with frozen ones. Try "
        'normswap.freeze(model, "all", stats="frozen") first'
    )
