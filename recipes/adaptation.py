"""`python -m recipes adaptation`: a labelled source, an unlabelled target, as two contexts.

AdaMatch (Berthelot et al., ICLR 2022, arXiv 2106.04732): cross-entropy on weak and strong views of
the source, and on strong views of the target with the model's own predictions on the weak ones,
aligned with the source's share of classes; those count whose confidence is at least --threshold
times the mean confidence on the source, with a weight that grows from 0 to 1 over the first half.
All views are one batch. Where the batch's other half changes the source's logits (bn and all
methods without contexts), these are also computed from the source alone and the two interpolated at
random, each logit by itself; with contexts the two are equal.

CN and CN-X take contexts "source" and "target", and are tested on target images as `target` (the
domain of a test image is taken as given: that is the task) and with the context unknown. In
`source-only` the model with BatchNorm takes as many steps on the source alone; NAME-frozen keeps
the statistics of the given weights; `cn-shared` is CN with one affine for both contexts. Target
images that test are not adapted to, and class labels of target images are only counted with.

Without --data: scikit-learn's handwritten digits at two angles, each training digit at one of them,
24 px, and a narrow ResNet-10-T from scratch (conversion after the first batches of both domains
gave its norms statistics). The paper's threshold is 0.9; 0.8 keeps more labels in so few steps.
--tune chooses by images of the source: labels of the target choose nothing.
"""

import math
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import images, scores, unlabelled
from .common.data import DomainData, Loader
from .common.errors import check
from .common.options import Parser, count, decay
from .common.training import takes_context
from .common.unlabelled import Alignment, Pseudo, Views, pseudo_loss

SOURCE, TARGET = 0, 1
CONTEXTS = ("source", "target")
ANGLES = ("0", "45")
UNTOLD = {k: f"target, {scores.HEADINGS[k]}" for k in scores.POLICIES}
HEADINGS = {"told": "target, told if taken", **UNTOLD, "source": "source"}


def run(options: Namespace) -> None:
    unlabelled.settle(options)
    data = load(options)
    title = f"source {data.domain_names[SOURCE]}, target {data.domain_names[TARGET]}"
    print(title)
    told = CONTEXTS, plan_of, measure, HEADINGS
    unlabelled.run(options, "adaptation", data, *told, title, "source")


def load(options: Namespace) -> DomainData:
    if options.data is None:
        options.source, options.target = options.source or ANGLES[0], options.target or ANGLES[1]
    names = (options.source, options.target)
    two = None not in names and names[SOURCE] != names[TARGET]
    check(two, f"expected --source and --target to be two domains, got {names}")
    if options.data is not None:
        return images.load(options, domains=names)
    angles = all(name.removeprefix("-").isdecimal() for name in names)
    check(angles, f"expected --source and --target as angles, got {' and '.join(names)}")
    return images.load(options, angles=[int(name) for name in names])


def plan_of(config: Namespace, views: Views) -> unlabelled.Plan:
    data = views.loader.data
    parts = [(data.train & (data.domains == d)).nonzero().flatten() for d in (SOURCE, TARGET)]
    align = Alignment(len(data.classes))

    def teach(
        model: nn.Module, index: int, known: Tensor, labels: Tensor, source: Tensor, weak: Tensor,
        strong: Tensor,
    ) -> tuple[Tensor, Pseudo]:  # fmt: skip
        if not takes_context(model):
            alone = without_trace(model, known)
            source = alone.lerp(source, torch.rand(source.shape).to(source))
        confident = source[: config.batch_size].detach().softmax(1)
        threshold = config.threshold * confident.max(1).values.mean()
        aligned = align(confident, weak.detach().softmax(1))
        pseudo = pseudo_loss(aligned, strong, threshold, one_hot=False)
        weight = 0.5 - 0.5 * math.cos(min(math.pi, 2 * math.pi * index / config.steps))
        return F.cross_entropy(source, labels) + weight * pseudo.loss, pseudo

    return unlabelled.plan(config, views, *parts, teach, both=True)


def measure(model: nn.Module, loader: Loader) -> dict[str, Any]:
    tests = map(loader.test_indices, (SOURCE, TARGET))
    source, target = (scores.by_label(model, loader, test) for test in tests)
    return {**target, "source": source.get("known", source.get("plain"))}


def without_trace(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in training once more, on copies of its buffers: statistics count one forward."""
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, copies, (images,))


def add_options(parser: Parser) -> None:
    unlabelled.add_options(parser, "source-only", steps=500, batch=32)
    add = parser.add_argument
    add("--source", help="domain with labels; an angle for the digits (0)")
    add("--target", help="domain without; an angle for the digits (45)")
    add("--ratio", type=count, default=1, help="target images a source image")
    add("--threshold", type=decay, default=0.8, help="of the source's confidence")
