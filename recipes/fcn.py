"""A segmentation network over any timm backbone that gives feature maps."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FCN(nn.Module):
    """Scores of every feature map, enlarged and added up (Long et al., CVPR 2015)."""

    def __init__(
        self, name: str, classes: int, levels: list[int], pretrained: bool, width: int = 64
    ) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            name, features_only=True, out_indices=levels, pretrained=pretrained
        )
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, classes, 1),
            )
            for channels in self.backbone.feature_info.channels()
        )
        made_for = timm.get_pretrained_cfg(name)
        self.register_buffer("mean", torch.tensor(made_for.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(made_for.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Give the scores (N, classes, H, W) of images (N, 3, H, W) in [0, 1]."""
        features = self.backbone((images - self.mean) / self.std)
        # By number: a loop over a list whose length only a run knows cannot be traced, and the
        # norms would find their labels in scope instead.
        coarsest = len(self.heads) - 1
        total = self.heads[coarsest](features[coarsest])
        for level in reversed(range(coarsest)):
            finer = self.heads[level](features[level])
            total = finer + F.interpolate(total, finer.shape[-2:], mode="bilinear")
        return F.interpolate(total, images.shape[-2:], mode="bilinear")
