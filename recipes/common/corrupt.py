"""Common corruptions of small images: ImageNet-C's families at its five severities.

    noise     gaussian_noise shot_noise impulse_noise
    blur      defocus_blur glass_blur motion_blur zoom_blur
    weather   snow fog brightness
    digital   contrast elastic_transform pixelate jpeg_compression

Parameters are those of ImageNet-C, with lengths in parts of its 224 px, so that a corruption does
to a small image what it does to a large one. The packages at hand run, but their parameters are
pixels of 224: at 32 px a defocus of radius 10 leaves nothing to recognise. Differs from the source:
fog is value noise whose octaves fade as the source's diamond-square does; elastic_transform and
glass_blur take CIFAR-10-C's parameters, in parts of its 32 px, since ImageNet-C's are tied to
pixels; glass_blur exchanges pixels, where the source's code copies one over the other; snow falls
on 224 px and is then averaged to the image's size; blurs are exact averages of the bilinear image
instead of OpenCV's and ImageMagick's kernels. Of ImageNet-C's fifteen these are fourteen: frost
pastes photographs of frost, which no dependency has.

Source: Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261, and the parameters its authors published with it.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from .augment import each

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
FAMILIES = tuple(name for names in GROUPS.values() for name in names)
SEVERITIES = (1, 2, 3, 4, 5)
SIZE = 224  # of the images that the published lengths are of
CIFAR = 32  # the same, where the parameters are CIFAR-10-C's
# By family what it does, and its parameter at each severity; a family's place numbers its draws.
TABLE: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {}


def family(*parameters: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function of float images, a parameter and a generator to the table."""
    return lambda function: TABLE.setdefault(function.__name__, (function, parameters))[0]


def corrupt(images: Tensor, family: str, severity: int, seed: int) -> Tensor:
    """Corrupt (N, 3, S, S) uint8 images on the CPU; the same arguments give the same result."""
    function, parameters = TABLE[family]
    # A generator of its own for each, so that families can be run in any order; numbered by the
    # table, so that one more at its end leaves the draws of the others as they were.
    number = 100 * list(TABLE).index(family) + severity
    generator = torch.Generator().manual_seed(seed * 10_007 + number)
    result = function(images.float() / 255, parameters[severity - 1], generator)
    return (result.clamp(0, 1) * 255).round().to(torch.uint8)


@family(0.08, 0.12, 0.18, 0.26, 0.38)
def gaussian_noise(x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return x + scale * torch.randn(x.shape, generator=generator)


@family(60, 25, 12, 5, 3)
def shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(x * photons, generator=generator) / photons


@family(0.03, 0.06, 0.09, 0.17, 0.27)
def impulse_noise(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(x.shape, generator=generator)
    salt = (drawn < amount / 2).to(x.dtype)
    return torch.where(drawn < amount, salt, x)


@family(3, 4, 6, 8, 10)
def defocus_blur(x: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    fine = torch.linspace(-1, 1, 41)
    points = torch.cartesian_prod(fine, fine)
    points = points[points.square().sum(1) <= 1] * (radius * x.shape[-1] / SIZE)
    return _average(x, points.expand(len(x), -1, -1), torch.ones(len(points)))


@family((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
def motion_blur(x: Tensor, how: tuple[float, float], generator: torch.Generator) -> Tensor:
    radius, sigma = (length * x.shape[-1] / SIZE for length in how)
    along = torch.linspace(0, 2 * radius, 33)
    angle = (torch.rand(len(x), generator=generator) * 2 - 1) * math.pi / 4
    direction = torch.stack([angle.sin(), angle.cos()], 1)
    points = along[None, :, None] * direction[:, None]
    return _average(x, points, (-along.square() / (2 * sigma**2)).exp())


@family((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
def zoom_blur(x: Tensor, how: tuple[float, float], generator: torch.Generator) -> Tensor:
    most, step = how
    factors = [1 + step * i for i in range(math.ceil((most - 1) / step - 1e-9))]
    zoomed = [_warp(x, torch.eye(2, 3).expand(len(x), 2, 3) / factor) for factor in factors]
    return (x + torch.stack(zoomed).sum(0)) / (len(factors) + 1)


@family((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
def fog(x: Tensor, how: tuple[float, float], generator: torch.Generator) -> Tensor:
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


@family(0.1, 0.2, 0.3, 0.4, 0.5)
def brightness(x: Tensor, more: float, generator: torch.Generator) -> Tensor:
    # Of hue, saturation and value only the value changes: the three channels by one factor.
    value = x.amax(1, keepdim=True)
    bright = (value + more).clamp(max=1)
    return torch.where(value > 0, x * (bright / value.clamp(min=1e-6)), bright)


@family(0.4, 0.3, 0.2, 0.1, 0.05)
def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


@family((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
def elastic_transform(
    x: Tensor, how: tuple[float, float, float], generator: torch.Generator
) -> Tensor:
    strength, smooth, corner = how
    n, size = len(x), x.shape[-1]
    # Three points of the image move, by up to `corner` of its side each: an affine map.
    points = torch.tensor([[2 / 3, 2 / 3], [2 / 3, -2 / 3], [-2 / 3, -2 / 3]]).expand(n, 3, 2)
    moved = points + 2 * corner * (2 * torch.rand(n, 3, 2, generator=generator) - 1)
    ones = torch.ones(n, 3, 1)
    theta = torch.linalg.solve(torch.cat([points, ones], 2), moved).mT
    field = 2 * torch.rand(n, 2, 32, 32, generator=generator) - 1
    if strength:
        field = _smooth(field, 32 * smooth)
    field = F.interpolate(field * strength, (size, size), mode="bicubic", align_corners=False)
    return _warp(x, theta, 2 * field.permute(0, 2, 3, 1))


@family(0.6, 0.5, 0.4, 0.3, 0.25)
def pixelate(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    size = x.shape[-1]
    few, box = (max(1, int(size * factor)),) * 2, Image.Resampling.BOX
    return _each(x, lambda image: image.resize(few, box).resize((size,) * 2, box))


@family(25, 18, 15, 10, 7)
def jpeg_compression(x: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    def change(image: Image.Image) -> Image.Image:
        image.save(file := io.BytesIO(), "JPEG", quality=quality)
        return Image.open(file)

    return _each(x, change)


@family((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
def glass_blur(x: Tensor, how: tuple[float, int, int], generator: torch.Generator) -> Tensor:
    sigma, reach, rounds = how
    n, size = len(x), x.shape[-1]
    sigma, reach = sigma * size / CIFAR, max(1, round(reach * size / CIFAR))
    every, source = torch.arange(n), torch.arange(size**2).repeat(n, 1)
    inside = range(size - reach, reach, -1)
    shape = (rounds, len(inside), len(inside), n)
    down, right = (torch.randint(-reach, reach, shape, generator=generator) for _ in range(2))
    for swaps in down * size + right:  # one after another, since a pixel may be moved again
        for row, moved in zip(inside, swaps, strict=True):
            for column, by in zip(inside, moved, strict=True):
                here = row * size + column
                first, second = source[:, here].clone(), source[every, here + by]
                source[every, here + by], source[:, here] = first, second
    shuffled = _smooth(x, sigma).flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1))
    return _smooth(shuffled.view_as(x), sigma)


@family(
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
def snow(x: Tensor, how: tuple[float, ...], generator: torch.Generator) -> Tensor:
    mean, deviation, zoom, least, radius, sigma, kept = how
    size, cells = x.shape[-1], math.ceil(SIZE / zoom)
    flakes = []
    for part in x.split(256):  # the images of 224 px would be large together
        noise = mean + deviation * torch.randn(len(part), 1, cells, cells, generator=generator)
        noise = F.interpolate(noise, (SIZE, SIZE), mode="bilinear", align_corners=True)
        layer = torch.where(noise < least, 0, noise).clamp(0, 1)
        flakes.append(F.interpolate(layer, (size, size), mode="area"))
    # A motion blur goes along rows, within 45 degrees; snow falls.
    fallen = motion_blur(torch.cat(flakes).mT, (radius, sigma), generator).mT
    grey = torch.einsum("nchw,c->nhw", x, torch.tensor([0.299, 0.587, 0.114]))[:, None]
    whiter = kept * x + (1 - kept) * torch.maximum(x, 1.5 * grey + 0.5)
    return whiter + fallen + fallen.flip(2, 3)


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


def _smooth(x: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian, cut off at three of its deviations."""
    size = 2 * math.ceil(3 * sigma) + 1
    return transforms.gaussian_blur(x, [size, size], [sigma, sigma])


def _warp(x: Tensor, theta: Tensor, shift: Tensor | None = None) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    grid = grid if shift is None else grid + shift
    return F.grid_sample(x, grid, "bilinear", padding_mode="reflection", align_corners=False)
