"""`python -m recipes bench`: what a method costs in a model, beside the model's own norms."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import normswap

from .errors import RecipeError
from .timing import Timing, interleave, peak_bytes

BASE = "as it is"
METHODS = ("cn", "cn-x", "selfnorm", "crossnorm")
HEADINGS = ("method", "train, ms", "ratio", "eval, ms", "ratio", "peak, MB", "ratio")


def make_model(name: str) -> nn.Module:
    """Return a timm model without pretrained weights: time does not depend on them."""
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    except RuntimeError as error:
        raise RecipeError(f"timm cannot make {name!r}: {error}") from error
    return model


def convert(model: nn.Module, method: str, contexts: int) -> nn.Module:
    """Return a converted copy; methods without labels are told of no contexts."""
    settings: dict[str, Any] = {"verify": False}
    if normswap.get_method(method).needs_context:
        settings["contexts"] = contexts
    return normswap.convert(model, method, **settings)


class Load:
    """One model at work: a training step, and a forward in eval.

    Args:
        model: takes images, and `context` where labels are given.
        images: a batch.
        labels: of its samples, or None.
        compiled: whether to run it through torch.compile.
        bf16: whether to run it under bfloat16 autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        compiled: bool = False,
        bf16: bool = False,
    ) -> None:
        self.model, self.images = model, images
        self.arguments = {} if labels is None else {"context": labels}
        self.run: Callable[..., Tensor] = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.bf16 = bf16

    def _forward(self) -> Tensor:
        kind = self.images.device.type
        with torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext():
            return self.run(self.images, **self.arguments)

    def train(self) -> None:
        """Run a step: forward, backward, optimizer."""
        self.model.train()
        self.optimizer.zero_grad()
        self._forward().float().logsumexp(1).mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def eval(self) -> None:
        """Run a forward in eval mode."""
        self.model.eval()
        self._forward()


def ratio(timing: Timing, base: Timing) -> str:
    """Return how the medians compare."""
    return f"{timing.median / base.median:.2f}"


def spread(timing: Timing) -> str:
    """Return the median and the quartiles."""
    return f"{timing.median:.3g} ({timing.low:.3g}-{timing.high:.3g})"


def bench_model(
    model: nn.Module,
    methods: Sequence[str],
    images: Tensor,
    contexts: int = 4,
    repeats: int = 10,
    compiled: bool = False,
    bf16: bool = False,
) -> list[list[str]]:
    """Return a row for the model and for each method; ratios are to the model as it is."""
    labels = torch.arange(len(images), device=images.device) % contexts
    loads = {BASE: Load(model, images, None, compiled, bf16)}
    for method in methods:
        given = labels if normswap.get_method(method).needs_context else None
        loads[method] = Load(convert(model, method, contexts), images, given, compiled, bf16)
    device = images.device
    steps = interleave({name: load.train for name, load in loads.items()}, device, repeats)
    peaks = {name: peak_bytes(load.train, device) for name, load in loads.items()}
    forwards = interleave({name: load.eval for name, load in loads.items()}, device, repeats)
    return [
        [
            name,
            spread(steps[name]),
            ratio(steps[name], steps[BASE]),
            spread(forwards[name]),
            ratio(forwards[name], forwards[BASE]),
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / peaks[BASE]:.2f}",
        ]
        for name in loads
    ]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes bench", description=__doc__)
    add = parser.add_argument
    add("--model", default="resnet50", help="a timm model (resnet50)")
    add("--method", nargs="+", default=list(METHODS), metavar="NAME", help="methods to compare")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=int, default=16, help="images in a batch (16)")
    add("--size", type=int, default=128, help="side of the images (128)")
    add("--contexts", type=int, default=4, help="contexts of methods that take labels (4)")
    add("--repeats", type=int, default=10, help="runs of each, in turn (10)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("--channels-last", action="store_true")
    add("--bf16", action="store_true", help="under bfloat16 autocast")
    add("--compile", action="store_true", help="every model through torch.compile")
    options = parser.parse_args(argv)
    for name in ("batch", "size", "contexts", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"expected --{name} of at least 1, got {getattr(options, name)}")
    for method in options.method:
        if method not in normswap.methods():
            parser.error(
                f"unknown method {method!r}; the methods are {', '.join(normswap.methods())}"
            )
    return options


def main(argv: list[str]) -> int:
    """Print the table."""
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        model = make_model(options.model).to(device, memory_format=layout)
        images = torch.randn(options.batch, 3, options.size, options.size, device=device)
        images = images.contiguous(memory_format=layout)
        rows = bench_model(
            model,
            options.method,
            images,
            options.contexts,
            options.repeats,
            options.compile,
            options.bf16,
        )
    except (RecipeError, normswap.NormswapError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.model}, batch {options.batch}, {options.size} px, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians and quartiles of "
        f"{options.repeats}; peak: memory a training step holds above the model's own"
    )
    print(tabulate(rows, HEADINGS, tablefmt="simple_outline", stralign="right"))
    return 0
