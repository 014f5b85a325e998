"""Networks that score every pixel, over the feature maps of a timm backbone.

Scores are (N, classes, H, W), of images (N, 3, H, W) in [0, 1].
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

from .errors import RecipeError
from .weights import SCRATCH, make_features

NARROWEST = 8  # channels of a decoder at the least


class Dense(nn.Module):
    """A backbone whose feature maps, the finest first, are of images as it was made for them."""

    def __init__(self, name: str, levels: list[int], pretrained: bool, weights: str) -> None:
        super().__init__()
        self.backbone = make_features(name, levels, pretrained, weights)
        self.channels: list[int] = self.backbone.feature_info.channels()
        for key in ("mean", "std"):
            made_for = torch.tensor(self.backbone.pretrained_cfg[key])
            self.register_buffer(key, made_for[:, None, None])

    def scaled(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def block(before: int, after: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


class FCN(Dense):
    """Scores of every feature map, enlarged and added up (Long et al., CVPR 2015)."""

    def __init__(
        self, name: str, classes: int, levels: list[int], pretrained: bool, width: int = 64
    ) -> None:
        super().__init__(name, levels, pretrained, SCRATCH)
        self.heads = nn.ModuleList(
            nn.Sequential(*block(channels, width), nn.Conv2d(width, classes, 1))
            for channels in self.channels
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(self.scaled(images))
        # By number: a loop over a list whose length only a run knows cannot be traced, and the
        # norms would find their labels in scope instead.
        coarsest = len(self.heads) - 1
        total = self.heads[coarsest](features[coarsest])
        for level in reversed(range(coarsest)):
            finer = self.heads[level](features[level])
            total = finer + F.interpolate(total, finer.shape[-2:], mode="bilinear")
        return F.interpolate(total, images.shape[-2:], mode="bilinear")


class UNet(Dense):
    """Features, the coarsest first, enlarged and joined by the next finer ones; two classes."""

    def __init__(self, name: str, levels: list[int], pretrained: bool, weights: str) -> None:
        super().__init__(name, levels, pretrained, weights)
        skips = [3, *self.channels]
        above, self.joins = skips.pop(), nn.ModuleList()
        for skip in reversed(skips):
            wide = max(skip, NARROWEST)
            self.joins.append(nn.Sequential(*block(above + skip, wide)))
            above = wide
        self.head = nn.Conv2d(above, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.scaled(images)
        skips = [x, *self.backbone(x)]
        last = len(self.joins)
        x = skips[last]
        for i in range(last):  # by number, as above
            skip = skips[last - 1 - i]
            x = self.joins[i](torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1))
        return self.head(x)


def start(
    make: Callable[..., Dense], config: Namespace, batches: Iterable[Tensor], keep: bool = False,
    **settings: Any,
) -> Dense:  # fmt: skip
    """Make a network and give its norms the statistics of these batches, or the backbone keeps its.

    A new BatchNorm claims mean 0 and variance 1; a norm that learns its statistics would start from
    that claim.
    """
    try:
        model = make(config.model, levels=config.levels, pretrained=config.pretrained, **settings)
        given = copy.deepcopy(model.backbone.state_dict())
        normswap.update_stats(model, batches, progress=False)
    except (normswap.NormswapError, RuntimeError, LookupError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{config.model} gives no feature maps {config.levels} of such images "
            f"({str(error).splitlines()[0]}); try other --levels, --model or sizes of images"
        ) from error
    if keep:
        model.backbone.load_state_dict(given)
    return model


@torch.inference_mode()
def predict(
    model: nn.Module, images: Tensor, context: Tensor | str | None,
    read: Callable[[Tensor], Tensor], together: int = 100,
) -> Tensor:  # fmt: skip
    """Give what is read of the scores of uint8 images, told their contexts, or the one of all."""
    model.eval()
    device, found = next(model.parameters()).device, []
    for rows in torch.arange(len(images)).split(together):
        of_rows = context[rows].to(device) if isinstance(context, Tensor) else context
        given = {} if context is None else {"context": of_rows}
        found.append(read(model(images[rows].to(device).float() / 255, **given)).cpu())
    return torch.cat(found)
