"""Small models of other libraries and inputs that they run on: sources of `tests.sweep`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from .libraries import smp_models, ultralytics_models
from .sources import Attempt, Candidate, images

_PIXELS = [Attempt(f"{s} px", {}, images(3, s, s)) for s in (32, 64, 128)]
_LARGE = [Attempt(f"{s} px", {}, images(3, s, s)) for s in (224, 480)]


def smp() -> Iterator[Candidate]:
    for name, build in smp_models():
        yield Candidate(name, "smp", build, _PIXELS)


def ultralytics() -> Iterator[Candidate]:
    for name, build in ultralytics_models():
        yield Candidate(name, "ultralytics", build, _PIXELS[1:])


def pytorchcv() -> Iterator[Candidate]:
    """Yield of each family the model with the smallest numbers in its name."""
    from pytorchcv import model_provider

    def build(name: str) -> nn.Module:
        model: nn.Module = model_provider.get_model(name)
        for module in model.modules():
            if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
                module.final_pool = nn.AdaptiveAvgPool2d(1)  # else 224 px alone would do
        return model

    families: dict[str, list[str]] = {}
    for name, make in model_provider._models.items():
        families.setdefault(make.__module__.rpartition(".")[2], []).append(name)
    for family, names in families.items():
        name = min(names, key=lambda n: (sum(map(int, re.findall(r"\d+", n))), n))
        yield Candidate(name, family, partial(build, name), [*_PIXELS[1:], *_LARGE])


_SHAPE, _STEPS = (8, 16, 32), (2, 2)
_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
_UNET = {**_FLAT, "channels": _SHAPE, "strides": _STEPS}
_CODER = {**_FLAT, "channels": (8, 16), "strides": _STEPS}
_BATCH = {"norm": "batch"}
_MIL = {"num_classes": 2, "pretrained": False, "backbone": "resnet18"}
# Name of the network, its arguments, shape of a sample.
MONAI: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("AHNet", {"spatial_dims": 2, "psp_block_num": 1}, (1, 64, 64)),
    ("AttentionUnet", _UNET, (3, 32, 32)),
    ("AutoEncoder", _CODER, (3, 32, 32)),
    (
        "AutoEncoder",
        {**_CODER, **_BATCH, "num_inter_units": 2, "inter_channels": (8,)},
        (3, 32, 32),
    ),
    ("BasicUNet", {**_FLAT, "features": (8, 8, 8, 8, 8, 8)}, (3, 32, 32)),
    ("BasicUNet", {**_FLAT, **_BATCH, "features": (8, 8, 8, 8, 8, 8)}, (3, 32, 32)),
    ("BasicUNetPlusPlus", {**_FLAT, **_BATCH, "features": (8, 8, 8, 8, 8, 8)}, (3, 32, 32)),
    (
        "Classifier",
        {
            "in_shape": (3, 32, 32),
            "classes": 3,
            **_BATCH,
            **{k: _UNET[k] for k in ("channels", "strides")},
        },
        (3, 32, 32),
    ),
    (
        "Discriminator",
        {"in_shape": (3, 32, 32), "channels": (8, 16), "strides": _STEPS},
        (3, 32, 32),
    ),
    ("DAF3D", {"in_channels": 1, "out_channels": 1, "visual_output": False}, (1, 16, 16, 16)),
    ("DenseNet121", _FLAT, (3, 64, 64)),
    (
        "DynUNet",
        {
            **_FLAT,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "deep_supervision": True,
            "filters": [8, 16, 32],
        },
        (3, 32, 32),
    ),
    (
        "DynUNet",
        {
            **_FLAT,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "norm_name": "batch",
            "res_block": True,
            "filters": [8, 16, 32],
        },
        (3, 32, 32),
    ),
    (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2},
        (3, 64, 64),
    ),
    (
        "FlexibleUNet",
        {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
        (3, 64, 64),
    ),
    ("FlexibleUNet", {"in_channels": 3, "out_channels": 2, "backbone": "resnet18"}, (3, 64, 64)),
    (
        "Generator",
        {
            "latent_shape": (16,),
            "start_shape": (8, 4, 4),
            "channels": (8, 4, 1),
            "strides": (2, 2, 1),
        },
        (16,),
    ),
    (
        "GlobalNet",
        {
            "image_size": [32, 32],
            "spatial_dims": 2,
            "in_channels": 3,
            "num_channel_initial": 8,
            "depth": 2,
        },
        (3, 32, 32),
    ),
    (
        "LocalNet",
        {
            "spatial_dims": 2,
            "in_channels": 3,
            "num_channel_initial": 8,
            "extract_levels": (0, 1, 2),
            "out_channels": 2,
        },
        (3, 32, 32),
    ),
    (
        "RegUNet",
        {
            "spatial_dims": 2,
            "in_channels": 3,
            "num_channel_initial": 8,
            "depth": 2,
            "out_channels": 2,
        },
        (3, 32, 32),
    ),
    ("HighResNet", {**_FLAT}, (3, 32, 32)),
    ("MILModel", {**_MIL, "mil_mode": "att"}, (2, 3, 64, 64)),
    ("MILModel", {**_MIL, "mil_mode": "mean"}, (2, 3, 64, 64)),
    ("MILModel", {**_MIL, "mil_mode": "att_trans"}, (2, 3, 64, 64)),
    (
        "MultiScalePatchDiscriminator",
        {
            "num_d": 2,
            "num_layers_d": 2,
            "spatial_dims": 2,
            "channels": 8,
            "in_channels": 3,
            "minimum_size_im": 64,
        },
        (3, 64, 64),
    ),
    (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 8, "in_channels": 3, "num_layers_d": 2},
        (3, 64, 64),
    ),
    ("Quicknat", {"num_channels": 3}, (3, 64, 64)),
    (
        "Regressor",
        {
            "in_shape": (3, 32, 32),
            "out_shape": 2,
            **_BATCH,
            **{k: _UNET[k] for k in ("channels", "strides")},
        },
        (3, 32, 32),
    ),
    ("SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 3}, (3, 64, 64)),
    ("SegResNet", {**_FLAT, "norm": "batch"}, (3, 32, 32)),
    ("SegResNetVAE", {**_FLAT, "norm": "instance", "input_image_size": (32, 32)}, (3, 32, 32)),
    ("SegResNetDS", {**_FLAT, "norm": "batch", "dsdepth": 2, "init_filters": 8}, (3, 64, 64)),
    ("SegResNetDS2", {**_FLAT, "norm": "batch", "dsdepth": 2, "init_filters": 8}, (3, 64, 64)),
    (
        "SPADENet",
        {
            **_FLAT,
            "out_channels": 3,
            "label_nc": 3,
            "input_shape": [32, 32],
            "channels": [8, 16],
            "norm": "INSTANCE",
            "is_vae": False,
        },
        (3, 32, 32),
    ),
    ("UNet", {**_UNET, "num_res_units": 2}, (3, 32, 32)),
    ("UNet", {**_UNET, "norm": "batch"}, (3, 32, 32)),
    ("VNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}, (1, 16, 16, 16)),
    (
        "VarAutoEncoder",
        {
            **{k: v for k, v in _CODER.items() if k != "in_channels"},
            "in_shape": (3, 32, 32),
            "latent_size": 4,
            "norm": "batch",
        },
        (3, 32, 32),
    ),
    ("resnet18", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 3}, (1, 32, 32, 16)),
    (
        "resnet50",
        {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 3, "shortcut_type": "A"},
        (3, 64, 64),
    ),
]


def monai() -> Iterator[Candidate]:
    import monai.networks.nets as nets

    def build(name: str, arguments: dict[str, Any]) -> nn.Module:
        model: nn.Module = getattr(nets, name)(**arguments)
        return model

    for number, (name, arguments, shape) in enumerate(MONAI):
        attempt = Attempt("x".join(map(str, shape)), {}, images(*shape))
        yield Candidate(f"{name} {number}", "monai", partial(build, name, arguments), [attempt])
