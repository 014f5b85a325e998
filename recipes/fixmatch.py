"""`python -m recipes fixmatch`: a few labels a class, and many images without.

FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685): cross-entropy on weak views of the labelled
images, and on strong views of the unlabelled ones with the model's own confident predictions on
their weak views. All views are one batch. BatchNorm beside CNSN, and CN and CN-X with two contexts,
"labelled" and "unlabelled": tested as `unlabelled`, since test images are like the unlabelled ones
(this needs no test label), and with the context unknown. In `labels-only` the model with BatchNorm
takes as many steps on the labelled images alone, on their weak and their strong views, so that what
the unlabelled images bring is not mistaken for what the augmentation brings; NAME-frozen keeps the
statistics of the given weights; `cn-shared` is CN with one affine for both contexts.

The unlabelled images are all training images, the labelled among them; seeds differ in which are
labelled, the initial weights and the batches. True labels of unlabelled images are only counted.
Without --data: scikit-learn's handwritten digits at 24 px and a narrow ResNet-10-T from scratch
(conversion after the first batches gave its norms statistics). With it, a folder CLASS/image or
DOMAIN/CLASS/image, whose domains are then mixed.
"""

from argparse import Namespace

import torch.nn.functional as F
from torch import Tensor, nn

from .common import images, scores, unlabelled
from .common.data import Loader
from .common.options import Parser, count, fraction
from .common.unlabelled import Pseudo, Views, pseudo_loss

UNLABELLED = 1
CONTEXTS = ("labelled", "unlabelled")
HEADINGS = {"told": "told unlabelled if taken", **{k: scores.HEADINGS[k] for k in scores.POLICIES}}


def run(options: Namespace) -> None:
    unlabelled.settle(options)
    data = images.load(options, angles=(0,), flat=True)
    images.pick(data, options.labels, 0, "--labels")
    title = f"FixMatch, {options.labels} labels for each of {len(data.classes)} classes"
    told = CONTEXTS, plan_of, measure, HEADINGS
    unlabelled.run(options, "fixmatch", data, *told, title, "told")


def plan_of(config: Namespace, views: Views) -> unlabelled.Plan:
    picked = images.pick(views.loader.data, config.labels, config.seed, "--labels")

    def teach(
        model: nn.Module, index: int, seen: Tensor, labels: Tensor, known: Tensor, weak: Tensor,
        strong: Tensor,
    ) -> tuple[Tensor, Pseudo]:  # fmt: skip
        pseudo = pseudo_loss(weak.softmax(1), strong, config.threshold, one_hot=True)
        return F.cross_entropy(known, labels) + pseudo.loss, pseudo

    return unlabelled.plan(config, views, picked, views.loader.train_indices, teach, both=False)


def measure(model: nn.Module, loader: Loader) -> dict[str, float]:
    return scores.by_label(model, loader, loader.test_indices(), lambda _: UNLABELLED)


def add_options(parser: Parser) -> None:
    unlabelled.add_options(parser, "labels-only", steps=800, batch=20)
    add = parser.add_argument
    add("--labels", type=count, default=4, help="a class")
    add("--ratio", type=count, default=3, help="unlabelled images a labelled one")
    add("--threshold", type=fraction, default=0.95, help="of a pseudo-label's confidence")
