"""How often a model is right on the images that test, by what it is told of their contexts."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import normswap

from . import parallel
from .data import Batch, Loader
from .training import Arm, takes_context

POLICIES = ("pooled", "posterior")
KNOWN, SUREST = "known", "most confident"
EVERY = (*POLICIES, SUREST)
T = TypeVar("T")
# Gives the context labels that a model is told for a batch.
Label = Callable[[Batch], Tensor | int]
HEADINGS = {
    "plain": "takes no context",
    "known": "context known",
    "pooled": "unknown: pooled",
    "posterior": "unknown: posterior",
}


def own(batch: Batch) -> Tensor:
    """Tell a model the contexts that the images have."""
    return batch.context


@torch.inference_mode()
def logits(
    model: nn.Module, loader: Loader, indices: Tensor, label: Label | None = None, amp: bool = False
) -> tuple[Tensor, Tensor]:
    """Give scores and labels of images as they are; of several processes each gives its part."""
    model.eval()
    found = [torch.empty(0, len(loader.data.classes), device=loader.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=loader.device)]
    for batch in loader.whole(indices):
        told: dict[str, Any] = {} if label is None else {"context": label(batch)}
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=amp):
            found.append(model(batch.images, **told).float())
        labels.append(batch.labels)
    return torch.cat(found), torch.cat(labels)


def accuracy(
    model: nn.Module, loader: Loader, indices: Tensor, label: Label | None = None, amp: bool = False
) -> float:
    """Measure the accuracy in per cent, over all processes; arguments as of `logits`."""
    found, labels = logits(model, loader, indices, label, amp)
    return 100 * int(parallel.total((found.argmax(1) == labels).sum())) / len(indices)


class Surest(nn.Module):
    """Answers as the context that is surest of an image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return normswap.most_confident(self.model, x)[0]


def by_told(
    model: nn.Module, measure: Callable[[nn.Module, Label | None], T], policies: Sequence[str]
) -> dict[str, T]:
    """Measure a model told its own contexts, and nothing by each policy; "" if it takes none."""
    if not takes_context(model):
        return {"": measure(model, None)}
    found = {KNOWN: measure(model, own)}
    for policy in policies:
        if policy in POLICIES:
            normswap.set_unknown(model, policy)
        found[policy] = measure(Surest(model) if policy == SUREST else model, None)
    return found


def by_label(
    model: nn.Module, loader: Loader, indices: Tensor, label: Label = own
) -> dict[str, float]:
    """Measure the accuracy by what a model is told, `plain` where it takes no contexts."""

    def measure(model: nn.Module, told: Label | None) -> float:
        return accuracy(model, loader, indices, told and label)

    return {told or "plain": value for told, value in by_told(model, measure, POLICIES).items()}


def known_mean(record: dict[str, Any]) -> float:
    """Give the mean of what `by_told` found in a training, told the contexts if they are taken."""
    found = record["accuracy"]
    return mean(found.get(KNOWN, found.get("")).values())


def rows_by_told(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give a record for a method, what it is told, and a seed, with the rate and what is beside."""
    rows = []
    for record in records:
        method, seed = record["cell"].values()
        for told, found in record["accuracy"].items():
            cell = {"method": f"{method}, {told}" if told else method, "seed": seed}
            more = {"rate": record["rate"], **record.get("more", {}).get(told, {})}
            more |= {"seconds": record["seconds"]} if "seconds" in record else {}
            rows.append({"cell": cell, **found, "mean": mean(found.values()), **more})
    return rows


def by_domain(
    model: nn.Module, loader: Loader, names: Sequence[str], label: Label | None = None,
    amp: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Measure the accuracy on the test images of each of these domains."""
    tests = {name: loader.test_indices(loader.data.domain_names.index(name)) for name in names}
    return {name: accuracy(model, loader, test, label, amp) for name, test in tests.items()}


def evaluate(arm: Arm, loader: Loader, config: Namespace) -> dict[str, dict[str, float]]:
    """Measure the accuracy by domain: `unknown` without labels, `known` told, of those trained."""
    parallel.agree_on_buffers(arm.model)
    data = loader.data
    found = {"unknown": by_domain(arm.model, loader, data.domain_names, None, config.amp)}
    if arm.takes_context:
        found["known"] = by_domain(arm.model, loader, data.contexts, own, config.amp)
    return found
