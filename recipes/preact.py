"""A pre-activation ResNet for images of 32 px, in timm's registry as `preact_resnet8`.

He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016: norm and activation
come before each convolution. timm's ResNetV2 made small, with the stem of its authors' networks for
CIFAR: one convolution of stride 1, no pooling.
"""

from typing import Any

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnetv2 import ResNetV2
from torch import nn

default_cfgs = generate_default_cfgs({
    "preact_resnet8.untrained": {
        "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "num_classes": 1000,
        "first_conv": "stem.0", "classifier": "head.fc", "crop_pct": 1.0,
    },
})  # fmt: skip


class PreActResNet(ResNetV2):  # type: ignore[misc]
    """Three blocks of two convolutions, of 16, 32 and 64 channels."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            layers=[1, 1, 1], channels=(16, 32, 64), stem_chs=16, basic=True,
            conv_layer=create_conv2d, norm_layer=BatchNormAct2d, **settings,
        )  # fmt: skip
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False))


@register_model
def preact_resnet8(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Make the network; there are no weights of it."""
    return build_model_with_cfg(PreActResNet, "preact_resnet8", pretrained, **settings)
