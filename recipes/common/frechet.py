"""Judging generated images: the Frechet distance between features, and a classifier of them.

A judge is a network that gives features and a linear classifier on these. Its distances are in the
units of its own features: they rank generators judged by the same judge, and mean little beside
those of another, such as the Inception net of published figures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from .errors import check
from .training import descend
from .weights import EFFICIENTNET_LITE0_TIMM, load_efficientnet_lite0

BATCH, EPOCHS = 128, 12
IMAGENET_SIZE = 96


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Give the squared Frechet distance between Gaussians fitted to sets of features (N, D), N > 1.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. The trace of the root is the sum of the
    roots of the eigenvalues of ``C_a^(1/2) C_b C_a^(1/2)``, which is symmetric.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", NeurIPS 2017.
    """
    finite = bool(a.isfinite().all() and b.isfinite().all())
    check(finite, "expected finite features; the images may hold NaN or infinity")
    a, b = a.double().cpu(), b.double().cpu()
    size = a.shape[1], -1  # of one feature torch gives the covariance as a number
    cov_a, cov_b = torch.cov(a.T).reshape(size), torch.cov(b.T).reshape(size)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


@dataclass(frozen=True)
class Judge:
    """A network of features (N, D), and a linear classifier that predicts classes from them."""

    name: str
    body: nn.Module
    predict: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Give features (N, D) of images (N, C, S, S) in [-1, 1] on any device, on the CPU."""
        return torch.cat([self.body(part.to(self.device)).cpu() for part in images.split(BATCH)])

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Give the percentage of features (N, D) that the classifier gives these labels."""
        return 100 * (self.predict(features) == labels).double().mean().item()


def small_judge(images: Tensor, labels: Tensor, classes: int, device: torch.device) -> Judge:
    """Train a small classifier, with dropout on its 64 features, on images (N, C, 32, 32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in pairwise((images.shape[1], 16, 32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU()).to(device)
        head = nn.Linear(64, classes).to(device)
        images, labels = images.to(device), labels.to(device)
        steps = EPOCHS * math.ceil(len(images) / 64)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(images)).to(device).split(64):
                scores = head(F.dropout(body(images[chosen]), 0.3))
                descend(F.cross_entropy(scores, labels[chosen]), optimizer)
                schedule.step()
    name = "a classifier trained on the training images"
    return Judge(name, body.eval(), lambda x: head(x.to(device)).argmax(1).cpu(), device)


class ImageNetFeatures(nn.Module):
    """The last block of EfficientNet-Lite0, averaged over positions: 320 features.

    The 1280 features behind it would need more images than a small data set holds out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model(EFFICIENTNET_LITE0_TIMM, num_classes=1000)
        self.net.load_state_dict(load_efficientnet_lite0())

    def forward(self, images: Tensor) -> Tensor:
        size = (IMAGENET_SIZE, IMAGENET_SIZE)
        large = F.interpolate(images, size, mode="bicubic", align_corners=False).clamp(-1, 1)
        (last,) = self.net.forward_intermediates(large, indices=1, intermediates_only=True)
        return last.mean((2, 3))


def imagenet_judge(images: Tensor, labels: Tensor, classes: int, device: torch.device) -> Judge:
    """Take ImageNet features, and fit a logistic regression on them to these images."""
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))

    def predict(features: Tensor) -> Tensor:
        return torch.from_numpy(fitted.predict(features.numpy()))

    body = ImageNetFeatures().eval().to(device)
    judge = Judge("EfficientNet-Lite0 of ImageNet", body, predict, device)
    fitted.fit(judge.features(images).numpy(), labels.numpy())
    return judge
