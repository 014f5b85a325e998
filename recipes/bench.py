"""`python -m recipes bench --model resnet50`: what a method costs beside the model's own norms."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn

import normswap

from .common import methods
from .common.options import Parser, count
from .common.training import takes_context, wait_for
from .common.weights import check_model_name

BASE = "as it is"
METHODS = ("cn", "cn-x", "selfnorm", "crossnorm")
HEADINGS = ("method", "train, ms", "ratio", "eval, ms", "ratio", "peak, MB", "ratio")
Cases = dict[str, Callable[[], object]]


class Timing(NamedTuple):
    """Milliseconds: the median of the repeats, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def make_model(name: str) -> nn.Module:
    """Give a timm model without pretrained weights: time does not depend on them."""
    check_model_name(name)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    return model


class Load:
    """A model at work, as it is or compiled, under autocast or not; some are told labels."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, compiled: bool, bf16: bool
    ) -> None:
        self.model, self.images, self.bf16 = model, images, bf16
        self.arguments = {"context": labels} if takes_context(model) else {}
        self.run: Callable[..., Tensor] = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def _forward(self) -> Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.run(self.images, **self.arguments)

    def train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self._forward().float().logsumexp(1).mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def eval(self) -> None:
        self.model.eval()
        self._forward()


def bench_model(
    model: nn.Module, names: Sequence[str], images: Tensor, contexts: int = 4, repeats: int = 10,
    compiled: bool = False, bf16: bool = False,
) -> list[list[str]]:  # fmt: skip
    """Give a row for the model and for each method; ratios are to the model as it is."""
    device, labels = images.device, torch.arange(len(images), device=images.device) % contexts
    models = {name: methods.convert(model, name, contexts, verify=False) for name in names}
    models = {BASE: model, **models}
    loads = {name: Load(m, images, labels, compiled, bf16) for name, m in models.items()}
    steps = interleave({name: load.train for name, load in loads.items()}, device, repeats)
    peaks = {name: peak_bytes(load.train, device) / 2**20 for name, load in loads.items()}
    forwards = interleave({name: load.eval for name, load in loads.items()}, device, repeats)
    rows = []
    for name, peak in peaks.items():
        row = [name]
        for times in (steps, forwards):
            row += [str(times[name]), f"{times[name].median / times[BASE].median:.2f}"]
        rows.append([*row, f"{peak:.0f}", f"{peak / peaks[BASE]:.2f}"])
    return rows


def interleave(
    cases: Cases, device: torch.device, repeats: int = 20, warmup: int = 3, calls: int = 1
) -> dict[str, Timing]:
    """Time each case in turn, `repeats` times, so that all meet the same machine.

    On a machine with other work only the ratios mean something, and medians of many repeats. With
    several calls, a time is that of one when they follow each other: on a GPU the host then works
    ahead of the device, as it does in training.
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(_time(case, device, calls) / calls)
    quarter = repeats // 4
    ordered = {name: sorted(values) for name, values in times.items()}
    return {
        n: Timing(statistics.median(v), v[quarter], v[-1 - quarter]) for n, v in ordered.items()
    }


def _time(case: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the milliseconds of several calls; those of the device, where it is a GPU."""
    wait_for(device)
    gpu = device.type == "cuda"
    start, end = (torch.cuda.Event(enable_timing=True) if gpu else None for _ in range(2))
    begin = time.perf_counter()
    if start is not None:
        start.record()
    for _ in range(calls):
        case()
    if start is None or end is None:
        return 1e3 * (time.perf_counter() - begin)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(case: Callable[[], object], device: torch.device) -> int:
    """Return the most memory a call held at one time above what was held before it."""
    case()
    if device.type == "cuda":
        wait_for(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        case()
    held = peak = 0
    # torch keeps no peak for the CPU, but its profiler sees every allocation in order.
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def add_options(parser: Parser) -> None:
    add, known = parser.add_argument, normswap.methods()
    add("--model", default="resnet50", help="a timm model")
    compared = f"methods to compare, of {', '.join(known)}"
    how = {"default": list(METHODS), "choices": known, "metavar": "NAME", "help": compared}
    add("--method", nargs="+", **how)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    add("--batch", type=count, default=16, help="images in a batch")
    add("--size", type=count, default=128, help="side of the images")
    add("--contexts", type=count, default=4, help="contexts of methods that take labels")
    add("--repeats", type=count, default=10, help="runs of each, in turn")
    add("--bf16", action="store_true", help="under bfloat16 autocast")
    add("--compile", action="store_true", help="every model through torch.compile")


def run(options: Namespace) -> None:
    device = torch.device(options.device)
    model = make_model(options.model).to(device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    more = (options.contexts, options.repeats, options.compile, options.bf16)
    rows = bench_model(model, options.method, images, *more)
    print(
        f"{options.model}, batch {options.batch}, {options.size} px, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians and quartiles of "
        f"{options.repeats}; peak: memory a training step holds above the model's own"
    )
    print(tabulate(rows, HEADINGS, tablefmt="simple_outline", stralign="right"))
