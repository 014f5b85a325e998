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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import timm
import timm.optim
import timm.scheduler
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

import normswap
from normswap.contexts import drop_labels

from . import parallel
from .data import Batch, Loader
from .errors import RecipeError, check
from .losses import loss_of, training_loss

LARGE = 1_000_003  # seeds of trainings are so far apart
NOTES = 10  # epochs.jsonl's lines of a training by steps
Log = Callable[[dict[str, Any]], None]
# Loss of a step, and figures for the record that are means over its samples.
Loss = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[nn.Module, int], Loss]


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
    loss: str

    @property
    def takes_context(self) -> bool:
        return takes_context(self.model)

    def step(
        self, loss: Callable[[], Loss], config: Namespace, update: int, share: float = 1.0
    ) -> Loss:
        """Step down a loss; `share` is that of this process in the whole batch."""
        torch.manual_seed(config.seed * LARGE + update)
        self.schedule.step_update(update)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.amp):
            value, figures = loss()
        # Gradients are averaged over processes, whose parts of the batch may differ in size.
        value = value * (share * parallel.size())
        self.optimizer.zero_grad()
        value.backward()
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        if not torch.nn.utils.get_total_norm(gradients.values(), torch.inf).isfinite():
            spoilt = next(name for name, grad in gradients.items() if not grad.isfinite().all())
            where = f"after step {update + 1}, where the gradient of {spoilt} was not finite"
            hint = f"try a smaller --lr than {config.lr:g}" + (", or leave out --amp" * config.amp)
            raise RecipeError(f"the loss of {self.name} is {value.item()} {where}; {hint}")
        self.optimizer.step()
        return value.detach() / parallel.size(), figures


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, steps: int
) -> tuple[torch.optim.Optimizer, timm.scheduler.scheduler.Scheduler]:
    """Give a model AdamW and a cosine schedule with a tenth of the steps as warm-up."""
    groups = normswap.param_groups(model, lr, weight_decay)
    optimizer = timm.optim.create_optimizer_v2(groups, opt="adamw", lr=lr)
    warmup = {"warmup_t": max(1, steps // 10), "warmup_lr_init": lr / 10}
    return optimizer, timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=steps, t_in_epochs=False, **warmup
    )


def make_arm(name: str, model: nn.Module, config: Namespace, steps: int) -> Arm:
    parallel.share_statistics(model, converted=name != "bn")
    tools = make_optimizer(model, config.lr, config.weight_decay, steps)
    return Arm(name, model, parallel.wrapped(model), *tools, loss_of(model, config.loss))


def takes_context(model: nn.Module) -> bool:
    """Tell whether the model's forward has a `context` argument, as converted models do."""
    return "context" in inspect.signature(model.forward).parameters


def told(model: nn.Module, x: Tensor, context: Tensor | str) -> Tensor:
    """Call a model, with these contexts if it takes some."""
    return model(x, context=context) if takes_context(model) else model(x)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer's step down a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit(
    model: nn.Module, step: Step, config: Namespace, log: Log
) -> tuple[nn.Module, dict[str, float]]:
    """Take the steps; give the moving average of the model, and the figures of the last tenth."""
    arm = make_arm(config.method, model, config, config.steps)
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True)
    every = max(1, config.steps // NOTES)
    noted: list[dict[str, float]] = []
    model.train()
    for index in range(config.steps):
        loss, figures = arm.step(partial(step, model, index), config, index)
        ema.update(model, step=index)
        noted.append({"loss": loss.item(), **{k: v.item() for k, v in figures.items()}})
        if (index + 1) % every == 0:
            log({"step": index + 1, **mean_of(noted[-every:])})
    return ema.module, mean_of(noted[-every:])


def fit_epochs(
    model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], loader: Loader, config: Namespace,
    log: Log,
) -> tuple[nn.Module, dict[str, float]]:  # fmt: skip
    """Take a step on each batch of the epochs; give what `fit` gives."""
    config.steps = config.epochs * loader.batches_per_epoch
    epochs = range(config.epochs)
    batches = chain.from_iterable(loader.train_epoch(config.seed, e) for e in epochs)
    return fit(model, lambda model, _: (loss(model, next(batches)), {}), config, log)


def mean_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each figure over the records that have it (NaN is to have none)."""
    values = {key: [r[key] for r in records if r[key] == r[key]] for key in records[0]}
    return {key: sum(found) / len(found) for key, found in values.items() if found}


def train_step(
    arm: Arm, batch: Batch, config: Namespace, update: int, share: float
) -> tuple[Tensor, float]:
    """Take one step; give loss and seconds."""

    def forward(images: Tensor, context: Tensor | None) -> Tensor:
        return arm.runner(images, context=context) if arm.takes_context else arm.runner(images)

    def loss() -> Loss:
        hidden = config.drop_labels > 0
        context = drop_labels(batch.context, config.drop_labels) if hidden else batch.context
        return training_loss(arm.loss, arm.model, forward, replace(batch, context=context)), {}

    wait_for(batch.images.device)
    start = time.perf_counter()
    value, _ = arm.step(loss, config, update, share)
    wait_for(batch.images.device)
    return value, time.perf_counter() - start


def train_epoch(
    arms: list[Arm], loader: Loader, config: Namespace, epoch: int
) -> dict[str, dict[str, Any]]:
    """Train every arm for an epoch, in lockstep.

    Nothing random outlives a step: batches come from the seed and the epoch, draws inside a model
    from the seed and the step. A run resumed after any epoch therefore repeats what an
    uninterrupted one does, with no random state to store.
    """
    steps: dict[str, list[tuple[Tensor, float]]] = {arm.name: [] for arm in arms}
    for arm in arms:
        arm.model.train()
    batches = tqdm(
        loader.train_epoch(config.seed, epoch), f"epoch {epoch + 1}/{config.epochs}", unit="batch",
        total=loader.batches_per_epoch, leave=False, disable=None if parallel.is_first() else True,
    )  # fmt: skip
    for index, batch in enumerate(batches):
        # In turns, so that neither arm always steps right after the batch was made.
        for arm in arms if index % 2 == 0 else reversed(arms):
            update = epoch * loader.batches_per_epoch + index
            share = len(batch.images) / loader.step_size
            steps[arm.name].append(train_step(arm, batch, config, update, share))
    report = {}
    first = torch.tensor([duration for _, duration in steps[arms[0].name]])
    for arm in arms:
        losses, seconds = zip(*steps[arm.name], strict=True)
        loss = parallel.total(torch.stack(losses)).mean().item()
        check_finite(loss, f"of {arm.name} in epoch {epoch + 1}", config.lr)
        report[arm.name] = {
            "loss": loss,
            "lr": arm.optimizer.param_groups[0]["lr"],
            "step_ms": 1000 * statistics.median(seconds),
            "step_ratio": (torch.tensor(seconds) / first)
            .quantile(torch.tensor([0.5, 0.1, 0.9]))
            .tolist(),
        }
    return report


def train(
    name: str, model: nn.Module, loader: Loader, config: Namespace, log: Log
) -> dict[str, Any]:
    """Train a model for the epochs, with the loss that the settings name as far as it allows.

    Gives what `train_epoch` reports of the last epoch.
    """
    arm = make_arm(name, model, config, config.epochs * loader.batches_per_epoch)
    for epoch in range(config.epochs):
        report = train_epoch([arm], loader, config, epoch)[name]
        log({"epoch": epoch + 1, "loss": report["loss"]})
    return report


def check_finite(loss: float, where: str, lr: float) -> None:
    """Refuse to go on with a loss that is not finite; `where` says of what and when it is."""
    check(math.isfinite(loss), f"the loss {where} is {loss}; try a smaller --lr than {lr:g}")


def fill_statistics(model: nn.Module, loader: Loader, seed: int, batches: int = 8) -> None:
    """Give a model built from scratch the running statistics of its first batches, averaged.

    A fresh BatchNorm claims mean 0 and variance 1 for every channel. A norm that learns its
    statistics instead of measuring them would start from that claim; this start is fair to both.
    """
    torch.manual_seed(seed)
    first = islice(loader.train_epoch(seed, -1, whole=True), batches)
    torch.optim.swa_utils.update_bn((batch.images for batch in first), model)


def wait_for(device: torch.device) -> None:
    """Wait for a GPU's queued work, so that a step's time is that of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
