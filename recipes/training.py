"""Models trained side by side on the same batches.

The models of a run ("arms") take each batch in turn, one step each, from the same random state. So
a comparison is of the models alone: same start, same images, same augmentation, same dropout draws,
same schedule; and their step times are taken alternately, under the same load of the machine.
"""

import inspect
import math
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import timm
import timm.optim
import timm.scheduler
import torch
from torch import Tensor, nn
from tqdm import tqdm

import normswap
from normswap.contexts import drop_labels

from . import parallel
from .data import Batch, Loader
from .errors import RecipeError
from .losses import loss_of, training_loss


@dataclass
class Arm:
    """One model of a run with its optimizer, schedule and loss.

    `runner` is what a training step calls: the model, or what joins several processes around it.
    """

    name: str
    model: nn.Module
    runner: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: timm.scheduler.scheduler.Scheduler
    takes_context: bool
    loss: str


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, steps: int
) -> tuple[torch.optim.Optimizer, timm.scheduler.scheduler.Scheduler]:
    """Give a model AdamW and a cosine schedule with a tenth of the steps as warm-up."""
    groups = normswap.param_groups(model, lr, weight_decay)
    optimizer = timm.optim.create_optimizer_v2(groups, opt="adamw", lr=lr)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=max(1, steps // 10),
        warmup_lr_init=lr / 10,
        t_in_epochs=False,
    )
    return optimizer, schedule


def make_arm(name: str, model: nn.Module, config: Namespace, steps_per_epoch: int) -> Arm:
    """Give a model what it trains with."""
    parallel.share_statistics(model, converted=name != "bn")
    steps = config.epochs * steps_per_epoch
    optimizer, schedule = make_optimizer(model, config.lr, config.weight_decay, steps)
    loss = loss_of(model, config.loss)
    runner = parallel.wrapped(model)
    return Arm(name, model, runner, optimizer, schedule, takes_context(model), loss)


def takes_context(model: nn.Module) -> bool:
    """Tell whether the model's forward has a `context` argument, as converted models do."""
    return "context" in inspect.signature(model.forward).parameters


def train_step(
    arm: Arm, batch: Batch, config: Namespace, update: int, share: float = 1.0
) -> tuple[Tensor, float, Tensor]:
    """Take one step; give the loss, the step's seconds, and the size of each gradient.

    Loss and sizes are still on the device; a size is the largest absolute value, 0 for a parameter
    without gradient. `share` is the share of the whole batch that this process has; losses of all
    processes add up.
    """
    device = batch.images.device
    torch.manual_seed(config.seed * 1_000_003 + update)
    wait_for(device)
    start = time.perf_counter()
    arm.schedule.step_update(update)
    if config.drop_labels > 0:
        batch = replace(batch, context=drop_labels(batch.context, config.drop_labels))
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        forward = partial(_forward, arm.runner, arm.takes_context)
        loss = training_loss(arm.loss, arm.model, forward, batch)
    arm.optimizer.zero_grad()
    # Gradients are averaged over processes, whose parts of the batch may differ in size.
    loss = loss * (share * parallel.size())
    loss.backward()
    arm.optimizer.step()
    wait_for(device)
    seconds = time.perf_counter() - start
    gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in arm.model.parameters()]
    norms = torch.stack(torch._foreach_norm(gradients, torch.inf))
    return loss.detach() / parallel.size(), seconds, norms


def train_epoch(
    arms: list[Arm], loader: Loader, config: Namespace, epoch: int
) -> dict[str, dict[str, Any]]:
    """Train every arm for an epoch, in lockstep.

    Nothing random outlives a step: batches come from the seed and the epoch, draws inside a model
    from the seed and the step. A run resumed after any epoch therefore repeats what an
    uninterrupted one does, with no random state to store.
    """
    steps: dict[str, list[tuple[Tensor, float, Tensor]]] = {arm.name: [] for arm in arms}
    for arm in arms:
        arm.model.train()
    batches = tqdm(
        loader.train_epoch(config.seed, epoch),
        total=loader.batches_per_epoch,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        unit="batch",
        leave=False,
        disable=None if parallel.is_first() else True,
    )
    for index, batch in enumerate(batches):
        # In turns, so that neither arm always steps right after the batch was made.
        for arm in arms if index % 2 == 0 else reversed(arms):
            update = epoch * loader.batches_per_epoch + index
            share = len(batch.images) / loader.step_size
            steps[arm.name].append(train_step(arm, batch, config, update, share))
    report = {}
    first = [duration for _, duration, _ in steps[arms[0].name]]
    for arm in arms:
        losses, seconds, norms = zip(*steps[arm.name], strict=True)
        loss = parallel.total(torch.stack(losses)).mean().item()
        if not math.isfinite(loss):
            raise RecipeError(
                f"the loss of {arm.name} is {loss} in epoch {epoch + 1}, "
                f"{_describe_gradients(arm.model, torch.stack(norms))}; try a smaller "
                f"--lr than {config.lr:g}" + (", or leave out --amp" if config.amp else "")
            )
        report[arm.name] = {
            "loss": loss,
            "lr": arm.optimizer.param_groups[0]["lr"],
            "step_ms": 1000 * statistics.median(seconds),
            "step_ratio": (torch.tensor(seconds) / torch.tensor(first))
            .quantile(torch.tensor([0.5, 0.1, 0.9]))
            .tolist(),
        }
    return report


def check_finite(loss: float, where: str, lr: float) -> None:
    """Refuse to go on with a loss that is not finite; `where` says of what and when it is."""
    if not math.isfinite(loss):
        raise RecipeError(f"the loss {where} is {loss}; try a smaller --lr than {lr:g}")


def fill_statistics(model: nn.Module, loader: Loader, seed: int, batches: int = 8) -> None:
    """Give a model built from scratch the running statistics of its first batches, averaged.

    A fresh BatchNorm claims mean 0 and variance 1 for every channel. A norm that learns its
    statistics instead of measuring them would start from that claim; this start is fair to both.
    """
    torch.manual_seed(seed)
    first = islice(loader.train_epoch(seed, -1, whole=True), batches)
    torch.optim.swa_utils.update_bn((batch.images for batch in first), model)


def _forward(model: nn.Module, contextual: bool, images: Tensor, context: Tensor | None) -> Tensor:
    return model(images, context=context) if contextual else model(images)


def _describe_gradients(model: nn.Module, norms: Tensor) -> str:
    """Say which gradients, of norms (steps, parameters), were not finite in the first such step."""
    spoilt = ~norms.isfinite()
    if not spoilt.any():
        return "with finite gradients in every step"
    step = spoilt.any(1).int().argmax().item()
    names = [n for (n, _), bad in zip(model.named_parameters(), spoilt[step], strict=True) if bad]
    more = f" and of {len(names) - 1} more parameters" if len(names) > 1 else ""
    return f"after step {step + 1}, where the gradient of {names[0]}{more} was not finite"


def wait_for(device: torch.device) -> None:
    """Wait for a GPU's queued work, so that a step's time is that of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
