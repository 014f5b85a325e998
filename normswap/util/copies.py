"""Copies of models: on the side, what cannot be copied as it is."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.util.arguments import describe
from normswap.util.distributed import shared_groups
from normswap.util.elements import elements_of, holds_nothing


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy that shares process groups; tensors computed with gradients are detached.

    Args:
        model: the model.
        memo: further objects that have their copies already, by id.

    Raises:
        ConversionError: an attribute that cannot be copied; the message names it.
    """
    memo = {**shared_groups(model), **(memo or {})}
    for tensor in attribute_tensors(model):
        # Cached by a forward (LeViT's biases), or by a hook (pruning): deepcopy refuses them.
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"cannot copy the model: {_culprit(model)}{type(error).__name__}: {error}; pass "
            "inplace=True where there is one, or take that out of the model"
        ) from error
    for module in model.modules():
        if id(module) in memo:  # the layers of einops are made anew, in training mode
            vars(memo[id(module)])["training"] = module.training
    return copied


def copy_structure(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers hold no values (meta device)."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(memo[id(p)], p.requires_grad)
    return copy_model(model, memo)


def attribute_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensor that each parameter, buffer, attribute, and list or dict there holds."""
    seen: set[int] = set()
    held = (v for m in model.modules() for v in vars(m).values())
    found: list[Any] = [value for value in held if not holds_nothing(value)]
    while found:
        value = found.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            found.extend(elements_of(value))


def attributes_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what each attribute of each module of a model holds, by qualified name."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            yield f"{name}.{key}".lstrip("."), value


def _culprit(model: nn.Module) -> str:
    """Return the name of the first attribute that cannot be copied alone, for a message."""
    memo = {**shared_groups(model), **{id(module): module for module in model.modules()}}
    for where, value in attributes_of(model):
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:
            return f"its attribute {where} ({describe(value)}): "
    return ""
