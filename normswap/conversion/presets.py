"""Settings of the authors' scripts, and sensible ones for families of timm models, by name.

Source: Tang et al., ICCV 2021, arXiv 2102.02811, and the scripts published with it; the families
of timm follow the ImageNet setting of ResNet-50 where the paper has none of their kind. The norm
at the input of a transformer is the "first layer" use of Faye et al., arXiv 2403.16798.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from normswap.errors import ConversionError
from normswap.util.arguments import check_choice

_CIFAR = {"optimizer": "SGD, Nesterov 0.9", "lr": 0.1, "schedule": "cosine", "batch_size": 128}


@dataclass(frozen=True)
class Preset:
    """Arguments of `normswap.convert` for each method, and the training they were used with.

    Attributes:
        methods: method -> arguments.
        training: what the authors trained with; recipes read it, convert does not.
    """

    methods: dict[str, dict[str, Any]]
    training: dict[str, Any] = field(default_factory=dict)


def _crossnorm(placement: str, crop: str, p: float, active: int = 1, **more: Any) -> dict[str, Any]:
    return {"placement": placement, "crop": crop, "p": p, "active": active, **more}


def _cifar(crossnorm: Any, selfnorm: str, cnsn: Any, epochs: int, decay: float) -> Preset:
    methods = {"crossnorm": crossnorm, "selfnorm": {"placement": selfnorm}, "cnsn": cnsn}
    return Preset(methods, {**_CIFAR, "epochs": epochs, "weight_decay": decay})


# A DenseNet layer is norm, activation, convolution: after its first norm is before its first
# convolution.
_FIRST_NORM: dict[str, Any] = {"select": ["*norm1", "*bn1"]}
_IMAGENET = {
    "crossnorm": _crossnorm("input", "both", 0.5),
    "selfnorm": {"placement": "post"},
    "cnsn": _crossnorm("post", "neither", 0.5, crossnorm_at="input"),
}
_IMAGENET_TRAINING = {
    "optimizer": "SGD, Nesterov 0.9",
    "lr": "0.1 * batch_size / 256",
    "schedule": "a tenth at epochs 30 and 60",
    "epochs": 90,
    "weight_decay": 1e-4,
}
_AFTER_NORMS = {
    "crossnorm": _crossnorm("norm", "neither", 0.5),
    "selfnorm": {"placement": "norm"},
    "cnsn": _crossnorm("norm", "neither", 0.5),
}
_STAGES: dict[str, Any] = {"select": "*layer[1-4]*"}

PRESETS = MappingProxyType(
    {
        "wideresnet-cifar10": _cifar(
            _crossnorm("post", "neither", 0.5, 2),
            "pre",
            _crossnorm("post", "both", 0.25, 2),
            100,
            5e-4,
        ),
        "wideresnet-cifar100": _cifar(
            _crossnorm("post", "neither", 0.5, 2),
            "post",
            _crossnorm("post", "both", 0.25, 2),
            100,
            5e-4,
        ),
        "resnext-cifar10": _cifar(
            _crossnorm("post", "neither", 0.5),
            "pre",
            _crossnorm("post", "neither", 0.25),
            200,
            5e-4,
        ),
        "resnext-cifar100": _cifar(
            _crossnorm("post", "neither", 0.25),
            "residual",
            _crossnorm("post", "neither", 0.5),
            200,
            5e-4,
        ),
        "resnet50-imagenet": Preset(_IMAGENET, _IMAGENET_TRAINING),
        "fcn-gta5": Preset(
            {
                "crossnorm": _crossnorm("post", "style", 0.5, **_STAGES),
                "selfnorm": {"placement": "residual", **_STAGES},
                "cnsn": _crossnorm("residual", "style", 0.5, crossnorm_at="post", **_STAGES),
            },
            {"epochs": 80, "crop": 713, "lr": 0.01, "schedule": "poly"},
        ),
        "allconv-cifar10": Preset(
            {**_AFTER_NORMS, "cnsn": _crossnorm("norm", "style", 0.5, 2)},
            {**_CIFAR, "epochs": 100, "weight_decay": 5e-4},
        ),
        "allconv-cifar100": Preset(
            {**_AFTER_NORMS, "cnsn": _crossnorm("norm", "style", 0.5)},
            {**_CIFAR, "epochs": 100, "weight_decay": 5e-4},
        ),
        "densenet-cifar10": Preset(
            {
                "crossnorm": _crossnorm("norm", "neither", 0.25, **_FIRST_NORM),
                "cnsn": _crossnorm("norm", "both", 0.5, **_FIRST_NORM),
            },
            {**_CIFAR, "epochs": 200, "weight_decay": 1e-4},
        ),
        "densenet-cifar100": Preset(
            {
                "crossnorm": _crossnorm("norm", "neither", 0.25, **_FIRST_NORM),
                "selfnorm": {"placement": "norm", **_FIRST_NORM},
                "cnsn": _crossnorm("norm", "both", 0.25, 2, **_FIRST_NORM),
            },
            {**_CIFAR, "epochs": 200, "weight_decay": 1e-4},
        ),
        # Images of sensors that differ, the sensor known: most of what contexts give is had there.
        "sensors": Preset({"cn": {"select": "first"}}),
        "resnet": Preset(_IMAGENET, _IMAGENET_TRAINING),
        "resnext": Preset(_IMAGENET, _IMAGENET_TRAINING),
        "wide_resnet": Preset(_IMAGENET, _IMAGENET_TRAINING),
        "regnet": Preset(_IMAGENET),
        "efficientnet": Preset(_IMAGENET),
        "mobilenet": Preset(_IMAGENET),
        "convnext": Preset(_IMAGENET),
        "densenet": Preset(_AFTER_NORMS),
        "vgg": Preset(_AFTER_NORMS),
        "vit": Preset({"cn": {"placement": "input"}, "cn-x": {"placement": "input"}}),
    }
)


def preset_arguments(name: str, method: str) -> dict[str, Any]:
    """Return a copy of the arguments a preset gives to a method.

    Raises:
        UnknownNameError: no such preset; the message lists the names.
        ConversionError: the preset has nothing for the method.
    """
    check_choice("preset", name, PRESETS)
    methods = PRESETS[name].methods
    if method not in methods:
        raise ConversionError(
            f"preset {name!r} has no settings for method {method!r}, only for "
            f"{', '.join(methods)}; expected one of these methods, or no preset"
        )
    return dict(methods[method])


def fill_from_preset(
    preset: str | None,
    method: str,
    placement: str | None,
    select: Any,
    options: dict[str, Any],
) -> tuple[str | None, Any, dict[str, Any]]:
    """Return placement, selection and options with what a preset says and the caller does not."""
    if preset is None:
        return placement, select, options
    given = preset_arguments(preset, method)
    preset_placement, preset_select = given.pop("placement", None), given.pop("select", None)
    return (
        preset_placement if placement is None else placement,
        preset_select if select is None else select,
        {**given, **options},
    )
