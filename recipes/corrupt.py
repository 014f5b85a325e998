"""Common corruptions of small images: ImageNet-C's families at its five severities.

    noise     gaussian_noise shot_noise impulse_noise
    blur      defocus_blur motion_blur zoom_blur
    weather   fog brightness
    digital   contrast elastic_transform pixelate jpeg_compression

Parameters are those of ImageNet-C, with lengths in parts of its 224 px, so that a corruption does
to a small image what it does to a large one. The packages at hand run, but their parameters are
pixels of 224: at 32 px a defocus of radius 10 leaves nothing to recognise. Differs from the source:
fog is value noise whose octaves fade as the source's diamond-square does; elastic_transform takes
CIFAR-10-C's parameters, since ImageNet-C's are tied to pixels; blurs are exact averages of the
bilinear image instead of OpenCV's and ImageMagick's kernels. Left out: glass blur (a shuffle of
pixels by less than one here), snow and frost (they need flakes and photographs of this size).

Source: Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261, and the parameters its authors published with it.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .augment import each

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "motion_blur", "zoom_blur"),
    "weather": ("fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
FAMILIES = tuple(name for names in GROUPS.values() for name in names)
SEVERITIES = (1, 2, 3, 4, 5)
SIZE = 224  # of the images that the published lengths are of


def corrupt(images: Tensor, family: str, severity: int, seed: int) -> Tensor:
    """Corrupt (N, 3, S, S) uint8 images on the CPU; the same arguments give the same result."""
    function, parameters = TABLE[family]
    # A generator of its own for each, so that families can be run in any order.
    number = 100 * FAMILIES.index(family) + severity
    generator = torch.Generator().manual_seed(seed * 10_007 + number)
    result = function(images.float() / 255, parameters[severity - 1], generator)
    return (result.clamp(0, 1) * 255).round().to(torch.uint8)


def _gaussian_noise(x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return x + scale * torch.randn(x.shape, generator=generator)


def _shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(x * photons, generator=generator) / photons


def _impulse_noise(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(x.shape, generator=generator)
    salt = (drawn < amount / 2).to(x.dtype)
    return torch.where(drawn < amount, salt, x)


def _defocus_blur(x: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    fine = torch.linspace(-1, 1, 41)
    points = torch.cartesian_prod(fine, fine)
    points = points[points.square().sum(1) <= 1] * (radius * x.shape[-1] / SIZE)
    return _average(x, points.expand(len(x), -1, -1), torch.ones(len(points)))


def _motion_blur(x: Tensor, how: tuple[float, float], generator: torch.Generator) -> Tensor:
    radius, sigma = (length * x.shape[-1] / SIZE for length in how)
    along = torch.linspace(0, 2 * radius, 33)
    angle = (torch.rand(len(x), generator=generator) * 2 - 1) * math.pi / 4
    direction = torch.stack([angle.sin(), angle.cos()], 1)
    points = along[None, :, None] * direction[:, None]
    return _average(x, points, (-along.square() / (2 * sigma**2)).exp())


def _zoom_blur(x: Tensor, how: tuple[float, float], generator: torch.Generator) -> Tensor:
    most, step = how
    factors = [1 + step * i for i in range(math.ceil((most - 1) / step - 1e-9))]
    zoomed = [_warp(x, torch.eye(2, 3).expand(len(x), 2, 3) / factor) for factor in factors]
    return (x + torch.stack(zoomed).sum(0)) / (len(factors) + 1)


def _fog(x: Tensor, how: tuple[float, float], generator: torch.Generator) -> Tensor:
    thickness, fading = how
    size = x.shape[-1]
    clouds = torch.zeros(len(x), 1, size, size)
    for octave in range(1, int(math.log2(size)) + 1):
        cells = torch.rand(len(x), 1, 2**octave + 1, 2**octave + 1, generator=generator)
        smooth = F.interpolate(cells, (size, size), mode="bilinear", align_corners=True)
        clouds += fading**-octave * smooth
    low, high = clouds.amin((1, 2, 3), True), clouds.amax((1, 2, 3), True)
    brightest = x.amax((1, 2, 3), True)
    fogged = x + thickness * (clouds - low) / (high - low)
    return fogged * brightest / (brightest + thickness)


def _brightness(x: Tensor, more: float, generator: torch.Generator) -> Tensor:
    # Of hue, saturation and value only the value changes: the three channels by one factor.
    value = x.amax(1, keepdim=True)
    bright = (value + more).clamp(max=1)
    return torch.where(value > 0, x * (bright / value.clamp(min=1e-6)), bright)


def _contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic(x: Tensor, how: tuple[float, float, float], generator: torch.Generator) -> Tensor:
    strength, smooth, corner = how
    n, size = len(x), x.shape[-1]
    # Three points of the image move, by up to `corner` of its side each: an affine map.
    points = torch.tensor([[2 / 3, 2 / 3], [2 / 3, -2 / 3], [-2 / 3, -2 / 3]]).expand(n, 3, 2)
    moved = points + 2 * corner * (2 * torch.rand(n, 3, 2, generator=generator) - 1)
    ones = torch.ones(n, 3, 1)
    theta = torch.linalg.solve(torch.cat([points, ones], 2), moved).mT
    field = 2 * torch.rand(n, 2, 32, 32, generator=generator) - 1
    if strength:
        half = math.ceil(3 * 32 * smooth)
        bell = (-torch.arange(-half, half + 1).square() / (2 * (32 * smooth) ** 2)).exp()
        bell = (bell / bell.sum()).expand(2, 1, 1, -1)
        for kernel, pad in ((bell, (half, half, 0, 0)), (bell.mT, (0, 0, half, half))):
            field = F.conv2d(F.pad(field, pad, mode="reflect"), kernel, groups=2)
    field = F.interpolate(field * strength, (size, size), mode="bicubic", align_corners=False)
    return _warp(x, theta, 2 * field.permute(0, 2, 3, 1))


def _pixelate(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    size = x.shape[-1]
    few = (max(1, int(size * factor)),) * 2

    def change(image: Image.Image) -> Image.Image:
        return image.resize(few, Image.Resampling.BOX).resize((size,) * 2, Image.Resampling.BOX)

    return _each(x, change)


def _jpeg(x: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(x, change)


def _each(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    return each((x * 255).round().to(torch.uint8), change).float() / 255


def _average(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Average the bilinear image over points around each pixel: (N, P, 2) as (y, x), in pixels."""
    n, channels = x.shape[:2]
    half = math.ceil(points.abs().max().item())
    offsets = torch.arange(-half, half + 1)
    near = (1 - (points[..., None] - offsets).abs()).clamp(min=0)
    kernels = torch.einsum("npi,npj,p->nij", near[:, :, 0], near[:, :, 1], weights / weights.sum())
    padded = F.pad(x, [half] * 4, mode="replicate").flatten(0, 1)[None]
    kernels = kernels.repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded, kernels, groups=n * channels).view_as(x)


def _warp(x: Tensor, theta: Tensor, shift: Tensor | None = None) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    grid = grid if shift is None else grid + shift
    return F.grid_sample(x, grid, "bilinear", padding_mode="reflection", align_corners=False)


# What each does, and its parameter at severities 1 to 5.
TABLE: dict[str, tuple[Callable[..., Tensor], Sequence[Any]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (
        _zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg, (25, 18, 15, 10, 7)),
}
