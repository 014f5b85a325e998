"""What recipes with unlabelled images share: options, views, pseudo-labels, the training, the run.

A model's predictions on weakly changed images teach it strongly changed ones:

    p = softmax(f(weak(u)));  loss = mean_i [max p_i >= threshold] * H(target_i, f(strong(u_i)))

Weak is a window of the image (shift, crop, flip: the data set's own augmentation); strong is timm's
RandAugment, another such window, and a rectangle erased.

Every method of a seed gets the same initial weights, images, views, steps and schedule. The model
tested is the moving average of the weights after the last step; nothing is chosen by its accuracy.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

import normswap

from . import grid, images, methods, reports
from .augment import colour, each, seeded
from .data import DomainData, Loader, validation
from .options import TUNED, ByData, Parser, resolve
from .training import LARGE, Log, Loss, Step, fit, told
from .weights import EFFICIENTNET_LITE0_TIMM, NARROW, SCRATCH

RAND_AUGMENT = "rand-m10-n2"
ALONE = ("source-only", "labels-only")  # BatchNorm, on the labelled images alone
COUNTED = {"kept": "pseudo-labels kept, %", "right": "of them right, %"}
# Indices of the images that give the norms of random weights their statistics, and the step.
Plan = tuple[Sequence[Tensor], Step]


def add_options(parser: Parser, plain: str, steps: int, batch: int) -> None:
    """Add the options that these recipes have in common, defaults of the digits given."""
    known = (plain, f"{plain}{methods.FROZEN}", *methods.known())
    shown = ("cnsn",) if plain == "labels-only" else ()
    grid.add_methods(parser, (plain, "bn", *shown, "cn", "cn-shared", "cn-x"), known)
    parser.share("data", "weights", "limit", "tune", "amp", flip=True, image_size=ByData(24, 64))
    parser.share(model=ByData(NARROW, EFFICIENTNET_LITE0_TIMM), steps=steps, batch_size=batch)
    parser.share(lr=TUNED, weight_decay=0.05, ema=0.98)


def settle(options: Namespace) -> None:
    resolve(options, packaged=True, seeds=1, steps=4, batch_size=10, limit=8)


class Views:
    """Weak and strong versions of a data set's images, ready for a model."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._augment = rand_augment_transform(RAND_AUGMENT, {"img_mean": colour(loader.mean)})
        self._erase = RandomErasing(probability=1.0, max_area=0.25, device=str(loader.device))

    def weak(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        return self.loader.batch(indices, generator).images

    def strong(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Give strongly changed versions of these images; the generator alone decides them."""
        with seeded(generator):
            changed = each(self.loader.data.images[indices], self._augment)
            # After normalisation, so that what is erased is the mean colour.
            return self._erase(self.loader.normalised(changed, generator))


def run(
    options: Namespace, recipe: str, data: DomainData, contexts: Sequence[str],
    plan: Callable[[Namespace, Views], Plan],
    measure: Callable[[nn.Module, Loader], dict[str, Any]],
    headings: dict[str, str], title: str, score: str,
) -> None:  # fmt: skip
    """Run a grid; `score` names what chooses a rate, and `told` is compared with BatchNorm."""
    for domain, name in enumerate(data.domain_names):
        here = data.domains == domain
        trains, tests = (int((here & part).sum()) for part in (data.train, data.test))
        size = f"{options.image_size} px"
        print(f"{name}: {trains:,} training and {tests:,} test images of {size}")

    # Labels of other domains than the first must have no say in what is left out.
    groups = torch.where(data.domains == 0, data.labels, len(data.classes) + data.domains)

    def train(data: DomainData, config: Namespace, log: Log) -> dict[str, Any]:
        part = data if config.final else validation(data, groups)
        model, loader, _ = images.build(config, part, config.seed, fill=False)
        views = Views(loader)
        start, step = plan(config, views)
        if options.weights == SCRATCH:
            # Norms that learn their statistics would otherwise start from those of no data.
            generator = torch.Generator().manual_seed(config.seed)
            batches = [views.weak(part, generator) for part in start]
            normswap.update_stats(model, batches, progress=False)
        how = {"example_inputs": (images.example(loader),), "verify": False}
        model = methods.convert(model, config.method, contexts, **how)
        averaged, figures = fit(model, step, config, log)
        found = measure(averaged, loader)
        found["told"] = found.get("known", found.get("plain"))
        return {**found, **figures}

    before = partial(images.build, options, seed=0, fill=False)
    folder, records = grid.run(
        options, recipe, lambda _: data, train, itemgetter(score), before=before
    )
    reports.show(folder, records, headings, title, COUNTED, "told")


def plan(
    config: Namespace, views: Views, labelled: Tensor, others: Tensor,
    teach: Callable[..., tuple[Tensor, "Pseudo"]], both: bool,
) -> Plan:  # fmt: skip
    """Plan steps on labelled images and, in the same batch, `ratio` times as many others.

    `teach` gives the loss of what a model finds in them. With `both` the labelled have strong views
    and a say in the first statistics, as the others do; where they are alone, strong views anyway.
    """
    data, device, size = views.loader.data, views.loader.device, config.batch_size
    generator = torch.Generator().manual_seed(config.seed)
    ours = draw(labelled, size, config.steps, generator)
    theirs = draw(others, size * config.ratio, config.steps, generator)
    alone = methods.base_of(config.method) in ALONE

    def step(model: nn.Module, index: int) -> Loss:
        generator = torch.Generator().manual_seed(config.seed * LARGE + index)
        labels = data.labels[ours[index]].to(device)
        known = views.weak(ours[index], generator)
        if both or alone:
            known = torch.cat([known, views.strong(ours[index], generator)])
            labels = labels.repeat(2)
        if alone:
            return F.cross_entropy(model(known), labels), {}
        weak, strong = (view(theirs[index], generator) for view in (views.weak, views.strong))
        found = forward(model, [known, weak, strong], (0, 1, 1))
        loss, pseudo = teach(model, index, known, labels, *found)
        return loss, counted(pseudo, data.labels[theirs[index]].to(device))

    first = [
        torch.cat(pair) if both else pair[1] for pair in zip(ours[:8], theirs[:8], strict=True)
    ]
    return first, step


def forward(model: nn.Module, parts: Sequence[Tensor], contexts: Sequence[int]) -> list[Tensor]:
    """Pass several sets of images as one batch, each with its context; give the logits of each."""
    sizes = [len(part) for part in parts]
    together = torch.cat(list(parts))
    labels = torch.tensor(contexts).repeat_interleave(torch.tensor(sizes))
    return list(told(model, together, labels.to(together.device)).split(sizes))


def draw(indices: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw the batches of a whole training: passes over `indices`, shuffled anew each time."""
    passes = math.ceil(steps * size / len(indices))
    order = [indices[torch.randperm(len(indices), generator=generator)] for _ in range(passes)]
    return torch.cat(order)[: steps * size].view(steps, size)


class Pseudo(NamedTuple):
    """The loss on strong views, and for the record which samples (N,) it took and what for."""

    loss: Tensor
    kept: Tensor
    labels: Tensor


def pseudo_loss(
    targets: Tensor, strong: Tensor, threshold: float | Tensor, one_hot: bool
) -> Pseudo:
    """Teach logits of strong views the confident ones of `targets`, or their likeliest class."""
    targets = targets.detach()
    confidence, labels = targets.max(1)
    kept = confidence >= threshold
    each = F.cross_entropy(strong, labels if one_hot else targets, reduction="none")
    return Pseudo((each * kept).mean(), kept, labels)


def counted(pseudo: Pseudo, truth: Tensor) -> dict[str, Tensor]:
    """Give the share of samples a pseudo-loss took, and of right labels among them, in %."""
    right = (pseudo.labels == truth)[pseudo.kept]
    return {"kept": 100 * pseudo.kept.float().mean(), "right": 100 * right.float().mean()}


class Alignment:
    """Distribution alignment: target predictions reweighed to the source's share of classes.

    ``normalise(p * E[p_source] / E[p_target])``, expectations as running averages over batches (a
    batch of some thirty images is too few to know the share of each of ten classes).
    """

    def __init__(self, classes: int, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.source = self.target = torch.full((classes,), 1 / classes)

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """Note the mean of both (N, classes) probabilities; give those of the target, aligned."""
        self.source = self.source.to(source).lerp(source.detach().mean(0), self.momentum)
        self.target = self.target.to(target).lerp(target.detach().mean(0), self.momentum)
        weighed = target * (self.source / self.target.clamp(min=1e-6))
        return weighed / weighed.sum(1, keepdim=True)
