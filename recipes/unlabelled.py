"""What recipes with unlabelled images share: options, data, models, the training, the test.

Every method of a seed gets the same initial weights, images, views, steps and schedule. The model
tested is the moving average of the weights after the last step; nothing is chosen by its accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import timm
import timm.data
import timm.optim
import timm.scheduler
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import normswap

from . import frozen, grid
from .config import DIGITS_MODEL, SCRATCH_LR, TUNE_LR
from .data import TEST_BATCH, DomainData
from .digits import load_digits
from .errors import RecipeError
from .finetune import check_model_name
from .folders import load_folder
from .pseudo import Views
from .training import takes_context
from .weights import EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_TIMM, make_backbone

SMOKE = {"steps": 4, "batch_size": 10, "limit": 8}
# The digits have 8 x 8 pixels: a sixteenth of the weights of the ResNet-10-T will do.
NARROW = {"channels": (16, 32, 64, 128), "stem_width": 8}
POLICIES = ("pooled", "posterior")
NOTES = 10  # epochs.jsonl's lines a training
# Loss of a step, and figures for the record that are means over its samples.
Step = Callable[[nn.Module, int], tuple[Tensor, dict[str, Tensor]]]


def add_arguments(parser: argparse.ArgumentParser, steps: int, batch: int) -> None:
    """Add the options that these recipes have in common, defaults of the digits given."""
    parser.add_argument("--image-size", type=int, help="pixels (digits: 24, folders: 64)")
    parser.add_argument("--limit", type=grid.count, help="images of each class of each domain")
    parser.add_argument(
        "--model",
        help=f"any timm model with BatchNorm (digits: a narrow {DIGITS_MODEL}; folders: "
        f"{EFFICIENTNET_LITE0_TIMM} with packaged ImageNet weights)",
    )
    parser.add_argument("--weights", help=f"a safetensors or torch file, or {EFFICIENTNET_LITE0}")
    parser.add_argument("--steps", type=grid.count, default=steps, help=f"(default: {steps})")
    parser.add_argument(
        "--batch-size", type=grid.count, default=batch, help=f"labelled images (default: {batch})"
    )
    parser.add_argument(
        "--lr", type=float, help=f"AdamW's ({SCRATCH_LR:g}; {TUNE_LR:g} from given weights)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05, help="(default: 0.05)")
    parser.add_argument("--ema", type=float, default=0.98, help="decay of weights (default: 0.98)")


def resolve(options: argparse.Namespace) -> None:
    """Fill in what depends on other options, and check the rest."""
    if not 0 <= options.ema < 1:
        raise RecipeError(f"expected --ema in [0, 1), got {options.ema:g}")
    if options.smoke:
        options.seeds = 1
        for name, value in SMOKE.items():
            setattr(options, name, value)
    if options.image_size is None:
        options.image_size = 24 if options.data is None else 64
    if options.model is None and options.data is not None:
        options.model = EFFICIENTNET_LITE0_TIMM
        options.weights = options.weights or EFFICIENTNET_LITE0
    if options.model is not None:
        check_model_name(options.model)
    if options.lr is None:
        options.lr = SCRATCH_LR if options.weights is None else TUNE_LR


def load(
    options: argparse.Namespace,
    angles: Sequence[int],
    domains: Sequence[str] | None = None,
    flat: bool = False,
) -> DomainData:
    """Load the folder, or without one the digits at these angles; the split is the same always."""
    if options.data is not None:
        return load_folder(
            options.data, options.image_size, limit=options.limit, domains=domains, flat=flat
        )
    limit = options.limit and options.limit * 10 * len(angles)
    return load_digits(options.image_size, limit=limit, angles=angles)


def build(options: argparse.Namespace, classes: int, seed: int) -> nn.Module:
    """Build the model that every method of a seed starts from."""
    torch.manual_seed(seed)
    settings = NARROW if options.model is None else {}
    name = options.model or DIGITS_MODEL
    return make_backbone(name, classes, weights=options.weights, **settings)[0]


def check(options: argparse.Namespace, data: DomainData) -> None:
    """Build the model once and try two images, before anything is written.

    Raises:
        RecipeError: if the weights are not the model's, or it cannot take images of this size.
    """
    model = build(options, len(data.classes), seed=0).eval()
    images = make_views(model, data, torch.device("cpu")).plain(torch.arange(2))
    try:
        with torch.inference_mode():
            model(images)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"{options.model or DIGITS_MODEL} cannot take images of {options.image_size} px "
            f"({str(error).splitlines()[0]}); set another --image-size"
        ) from error


def make_views(model: nn.Module, data: DomainData, device: torch.device) -> Views:
    """Give the views of the images, normalised as the model wants them."""
    config = timm.data.resolve_model_data_config(model)
    return Views(data, config["mean"], config["std"], device)


def converted(
    model: nn.Module, method: str, contexts: Sequence[str], images: Tensor, plain: Sequence[str]
) -> nn.Module:
    """Convert the model, or for the methods in `plain` do not; freeze statistics if asked."""
    name = frozen.name_of(method)
    if name not in plain:
        given = contexts if normswap.get_method(name).needs_context else None
        model = normswap.convert(
            model, name, contexts=given, example_inputs=(images,), verify=False
        )
    return frozen.freeze_if_asked(method, model)


def forward(model: nn.Module, images: Sequence[Tensor], contexts: Sequence[int]) -> list[Tensor]:
    """Pass several sets of images as one batch, each with its context; give the logits of each."""
    sizes = [len(part) for part in images]
    together = torch.cat(list(images))
    if not takes_context(model):
        return list(model(together).split(sizes))
    labels = torch.tensor(contexts).repeat_interleave(torch.tensor(sizes))
    return list(model(together, context=labels.to(together.device)).split(sizes))


def train(
    model: nn.Module, step: Step, options: argparse.Namespace, seed: int, log: grid.Log
) -> tuple[nn.Module, dict[str, float]]:
    """Take the steps; give the moving average of the model, and the figures of the last tenth.

    Raises:
        RecipeError: if the loss is not finite.
    """
    groups = normswap.param_groups(model, options.lr, options.weight_decay)
    optimizer = timm.optim.create_optimizer_v2(groups, opt="adamw", lr=options.lr)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=options.steps,
        warmup_t=max(1, options.steps // 10),
        warmup_lr_init=options.lr / 10,
        t_in_epochs=False,
    )
    ema = ModelEmaV3(model, decay=options.ema, use_warmup=True)
    every = max(1, options.steps // NOTES)
    noted: list[dict[str, float]] = []
    model.train()
    for index in range(options.steps):
        torch.manual_seed(seed * 1_000_003 + index)
        schedule.step_update(index)
        loss, figures = step(model, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model, step=index)
        noted.append({"loss": loss.item(), **{k: v.item() for k, v in figures.items()}})
        if not torch.isfinite(loss):
            raise RecipeError(
                f"the loss is {loss.item()} in step {index + 1}; try a smaller --lr than "
                f"{options.lr:g}"
            )
        if (index + 1) % every == 0:
            log({"step": index + 1, **mean_of(noted[-every:])})
    return ema.module, mean_of(noted[-every:])


def mean_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each figure over the records that have it (NaN is to have none)."""
    values = {key: [r[key] for r in records if r[key] == r[key]] for key in records[0]}
    return {key: sum(found) / len(found) for key, found in values.items() if found}


@torch.no_grad()
def evaluate(model: nn.Module, views: Views, indices: Tensor, context: int) -> dict[str, float]:
    """Measure the accuracy on images of one context, in per cent.

    Returns:
        For a model that takes contexts, `known`: with this one; `pooled`, `posterior`: with none,
        by that policy. For another, `plain`.
    """
    model.eval()
    labels = views.data.labels[indices].to(views.device)

    def accuracy(known: bool) -> float:
        logits = []
        for part in indices.split(TEST_BATCH):
            images = views.plain(part)
            logits.append(model(images, context=context) if known else model(images))
        return 100 * (torch.cat(logits).argmax(1) == labels).float().mean().item()

    if not takes_context(model):
        return {"plain": accuracy(known=False)}
    found = {"known": accuracy(known=True)}
    for policy in POLICIES:
        normswap.set_unknown(model, policy)
        found[policy] = accuracy(known=False)
    return found
