"""A DCGAN for images of 32 px, built with any of the norms, and one step of its training."""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

from . import methods
from .training import descend, told

NOISE, SIZE, BATCH = 64, 32, 64
# BatchNorm that is given the class beside its input: the usual way to make a DCGAN conditional.
ONEHOT = "bn-onehot"


def generator_of(noise: int, channels: int, width: int) -> nn.Sequential:
    """Make images (N, channels, 32, 32) in [-1, 1] of noise (N, noise); `width` sets the size."""
    layers: list[nn.Module] = [nn.Unflatten(1, (noise, 1, 1))]
    for before, after in pairwise((noise, 4 * width, 2 * width, width)):
        step = (2, 1) if len(layers) > 1 else (1, 0)
        layers += [nn.ConvTranspose2d(before, after, 4, *step, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())


def discriminator_of(channels: int, width: int) -> nn.Sequential:
    """Score images (N, channels, 32, 32): (N,), high for real ones."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before in (width, 2 * width):
        layers += [nn.Conv2d(before, 2 * before, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(2 * before), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4), nn.Flatten(0))


class OneHot(nn.Module):
    """A network that is given the class beside its input, as marks or as planes of an image."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        marks = F.one_hot(context, self.classes).to(x.dtype)
        marks = marks.reshape(*marks.shape, *(1 for _ in x.shape[2:]))
        return self.net(torch.cat((x, marks.expand(-1, -1, *x.shape[2:])), 1))


class Pair(nn.Module):
    """The two networks of a GAN, which are told the classes if they take them."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def make(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Make images (N, C, 32, 32); the labels (N,) count only if the method knows of them."""
        return told(self.generator, noise, labels)

    def score(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images, given the classes they have or were asked for."""
        return told(self.discriminator, images, labels)


def build(
    method: str, classes: list[str], width: int, images: Tensor, labels: Tensor, seed: int
) -> Pair:
    """Build both networks with the weights of the DCGAN paper, N(0, 0.02), and convert them.

    Every method of a seed has the same weights; `ONEHOT` has more of them. A fresh BatchNorm claims
    mean 0 and variance 1; norms that learn their statistics would start from that claim, so all
    get those of a few hundred of the images, and of images generated from noise.
    """
    torch.manual_seed(seed)
    extra = len(classes) if method == ONEHOT else 0
    channels = images.shape[1]
    nets: list[nn.Module] = [
        generator_of(NOISE + extra, channels, width), discriminator_of(channels + extra, width)
    ]  # fmt: skip
    for module in (module for net in nets for module in net.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
    nets = [OneHot(net, extra) for net in nets] if extra else nets
    chosen = torch.randperm(len(images))[: 4 * BATCH]
    noise, images, labels = torch.randn(len(chosen), NOISE), images[chosen], labels[chosen]
    for net, seen in zip(nets, (noise, images), strict=True):
        forward = partial(told, context=labels)
        normswap.update_stats(net, [seen], forward=forward, progress=False)
    return Pair(*(methods.convert(net, method, classes, verify=False) for net in nets))


def train_step(
    pair: Pair, of_generator: torch.optim.Optimizer, of_discriminator: torch.optim.Optimizer,
    images: Tensor, labels: Tensor, noise: Tensor,
) -> Tensor:  # fmt: skip
    """Step the discriminator, then the generator; give their losses, (2,).

    Real and generated images go through the discriminator in two forwards, so that batch
    statistics are of the one or the other. The generator is asked for the classes of the batch.
    """
    fake = pair.make(noise, labels)
    real_score, fake_score = pair.score(images, labels), pair.score(fake.detach(), labels)
    # -log D(real) - log(1 - D(fake)), where D is the sigmoid of the score.
    loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
    descend(loss, of_discriminator)
    fooling = F.softplus(-pair.score(fake, labels)).mean()
    descend(fooling, of_generator)
    return torch.stack((loss.detach(), fooling.detach()))
