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


def _at(placement: str, **more: Any) -> dict[str, Any]:
    return {"placement": placement, **more}


def _crossnorm(placement: str, crop: str, p: float, active: int = 1, **more: Any) -> dict[str, Any]:
    return _at(placement, crop=crop, p=p, active=active, **more)


def _cifar(epochs: int, crossnorm: Any, selfnorm: Any, cnsn: Any, decay: float = 5e-4) -> Preset:
    given = {"crossnorm": crossnorm, "selfnorm": selfnorm, "cnsn": cnsn}
    methods = {name: arguments for name, arguments in given.items() if arguments is not None}
    return Preset(methods, {**_CIFAR, "epochs": epochs, "weight_decay": decay})


# A DenseNet layer is norm, activation, convolution: after its first norm is before its first
# convolution.
_FIRST_NORM: dict[str, Any] = {"select": ["*norm1", "*bn1"]}
_STAGES: dict[str, Any] = {"select": "*layer[1-4]*"}
_QUARTER, _HALF = (_crossnorm("post", "neither", p) for p in (0.25, 0.5))
_TWICE, _BOTH = _crossnorm("post", "neither", 0.5, 2), _crossnorm("post", "both", 0.25, 2)
_NORMS = _crossnorm("norm", "neither", 0.5)
_FIRST = _crossnorm("norm", "neither", 0.25, **_FIRST_NORM)
_IMAGENET = {
    "crossnorm": _crossnorm("input", "both", 0.5),
    "selfnorm": _at("post"),
    "cnsn": _crossnorm("post", "neither", 0.5, crossnorm_at="input"),
}
_IMAGENET_TRAINING = {
    "optimizer": "SGD, Nesterov 0.9",
    "lr": "0.1 * batch_size / 256",
    "schedule": "a tenth at epochs 30 and 60",
    "epochs": 90,
    "weight_decay": 1e-4,
}
_RESNET, _LIKE_RESNET = Preset(_IMAGENET, _IMAGENET_TRAINING), Preset(_IMAGENET)
_AFTER_NORMS = {"crossnorm": _NORMS, "selfnorm": _at("norm"), "cnsn": _NORMS}

PRESETS = MappingProxyType(
    {
        "wideresnet-cifar10": _cifar(100, _TWICE, _at("pre"), _BOTH),
        "wideresnet-cifar100": _cifar(100, _TWICE, _at("post"), _BOTH),
        "resnext-cifar10": _cifar(200, _HALF, _at("pre"), _QUARTER),
        "resnext-cifar100": _cifar(200, _QUARTER, _at("residual"), _HALF),
        "resnet50-imagenet": _RESNET,
        "fcn-gta5": Preset(
            {
                "crossnorm": _crossnorm("post", "style", 0.5, **_STAGES),
                "selfnorm": _at("residual", **_STAGES),
                "cnsn": _crossnorm("residual", "style", 0.5, crossnorm_at="post", **_STAGES),
            },
            {"epochs": 80, "crop": 713, "lr": 0.01, "schedule": "poly"},
        ),
        "allconv-cifar10": _cifar(100, _NORMS, _at("norm"), _crossnorm("norm", "style", 0.5, 2)),
        "allconv-cifar100": _cifar(100, _NORMS, _at("norm"), _crossnorm("norm", "style", 0.5)),
        "densenet-cifar10": _cifar(
            200, _FIRST, None, _crossnorm("norm", "both", 0.5, **_FIRST_NORM), 1e-4
        ),
        "densenet-cifar100": _cifar(
            200,
            _FIRST,
            _at("norm", **_FIRST_NORM),
            _crossnorm("norm", "both", 0.25, 2, **_FIRST_NORM),
            1e-4,
        ),
        # Images of sensors that differ, the sensor known: most of what contexts give is had there.
        "sensors": Preset({"cn": {"select": "first"}}),
        **dict.fromkeys(("resnet", "resnext", "wide_resnet"), _RESNET),
        **dict.fromkeys(("regnet", "efficientnet", "mobilenet", "convnext"), _LIKE_RESNET),
        **dict.fromkeys(("densenet", "vgg"), Preset(_AFTER_NORMS)),
        "vit": Preset({"cn": _at("input"), "cn-x": _at("input")}),
    }
)


def fill_from_preset(
    preset: str | None, method: str, placement: str | None, select: Any, options: dict[str, Any]
) -> tuple[str | None, Any, dict[str, Any]]:
    """Return placement, selection and options with what a preset says and the caller does not.

    Raises:
        UnknownNameError: no such preset; the message lists the names.
        ConversionError: the preset has nothing for the method.
    """
    if preset is None:
        return placement, select, options
    check_choice("preset", preset, PRESETS)
    methods = PRESETS[preset].methods
    if method not in methods:
        raise ConversionError(
            f"preset {preset!r} has no settings for method {method!r}, only for "
            f"{', '.join(methods)}; expected one of these methods, or no preset"
        )
    given = dict(methods[method])
    own = {name: given.pop(name, None) for name in ("placement", "select")}
    placement = own["placement"] if placement is None else placement
    return placement, own["select"] if select is None else select, {**given, **options}
