"""`python -m recipes adversarial`: AdvProp, clean and adversarial images as contexts.

Each step trains on a batch and on its adversarial version together. That is made by projected
gradient ascent from a random start, on the model in evaluation, told the context `adversarial`: a
few steps along the sign of the gradient, no pixel further than --eps of 255 from what it was. The
paper gives each kind a BatchNorm of its own, which is `cn`.

    bn          clean images alone
    bn-both     one BatchNorm for both kinds

Accuracy is on clean images, told so, and on images attacked in the same way, told so; beside it, on
images that are attacked through the context `clean` and not known to be. Figures are of the last
step. Data and --limit are as of `sensors`, without its cameras; --tune chooses by clean images.

Source: Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020, arXiv 1911.09665.
Differs from source: the attack is made in evaluation, not with the statistics of the batch.
"""

from argparse import Namespace
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import grid, reports, tiles
from .common.data import Batch, DomainData, Loader
from .common.options import Parser, count, rate, resolve
from .common.tiles import MEAN, STD, start
from .common.training import Log, fit_epochs, takes_context, told

KINDS = ("clean", "adversarial")
METHODS = ("bn", "bn-both", "cn", "cn-first", "cn-x-batch")
HEADINGS = {"clean": "clean", "attacked": "attacked"}


def run(options: Namespace) -> None:
    resolve(options, backbone=False, epochs=1, limit=4)
    chosen, source = itemgetter("clean"), tiles.source(options)
    folder, records = grid.run(options, "adversarial", source, train_one, chosen)
    more = {"unknown": "attacked, told clean"}
    title = f"accuracy on clean and on attacked images (eps {options.eps:g} of 255), %"
    reports.show(folder, records, HEADINGS, title, more, ["clean", "attacked"])


def train_one(data: DomainData, config: Namespace, log: Log) -> dict[str, Any]:
    """Train one model; give its accuracies in per cent."""
    model, loader = start(data, config, KINDS)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if config.method == "bn":
            return F.cross_entropy(model(batch.images), batch.labels)
        attacked = attack(model, batch.images, batch.labels, config, "adversarial")
        kinds = torch.arange(2, device=attacked.device).repeat_interleave(len(attacked))
        found = told(model, torch.cat([batch.images, attacked]), kinds)
        return F.cross_entropy(found, batch.labels.repeat(2))

    model, figures = fit_epochs(model, loss, loader, config, log)
    return {**figures, **measure(model, loader, config)}


def attack(model: nn.Module, x: Tensor, labels: Tensor, how: Namespace, kind: str) -> Tensor:
    """Give images within eps of these, of 255, on which the model, told their kind, errs more."""
    training = model.training
    model.eval()
    eps = how.eps / 255 / STD
    low, high = (0 - MEAN) / STD, (1 - MEAN) / STD
    found = x + eps * (2 * torch.rand_like(x) - 1)
    for _ in range(how.attack_steps):
        found.requires_grad_()
        loss = F.cross_entropy(told(model, found, kind), labels)
        (slope,) = torch.autograd.grad(loss, found)
        # Together the steps could go two and a half times as far as they may.
        found = found.detach() + 2.5 * eps / how.attack_steps * slope.sign()
        found = found.clamp(x - eps, x + eps).clamp(low, high)
    model.train(training)
    return found


def measure(model: nn.Module, loader: Loader, how: Namespace) -> dict[str, float]:
    """Give the accuracy in per cent on test images: clean, attacked, attacked and told clean."""
    model.eval()
    torch.manual_seed(0)
    wanted = {"clean": "clean", "attacked": "adversarial"}
    if takes_context(model):
        wanted["unknown"] = "clean"
    right = dict.fromkeys(wanted, 0)
    for batch in loader.whole(loader.test_indices()):
        for name, kind in wanted.items():
            x, labels = batch.images, batch.labels
            x = x if name == "clean" else attack(model, x, labels, how, kind)
            with torch.inference_mode():
                right[name] += int((told(model, x, kind).argmax(1) == labels).sum())
    return {name: 100 * hits / len(loader.test_indices()) for name, hits in right.items()}


def add_options(parser: Parser) -> None:
    tiles.add_options(parser, METHODS, METHODS)
    parser.share(lr=2e-3, epochs=4)
    add = parser.add_argument
    add("--eps", type=rate, default=4.0, help="most that a pixel is changed by, of 255")
    add("--attack-steps", type=count, default=2, help="of the attack")
