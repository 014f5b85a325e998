"""Whole models at work: a training step and a forward in eval, against the model as it is."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

import normswap
from recipes.bench import BASE, Load, interleave, make_model, peak_bytes
from recipes.common import methods
from tests.gpu.graphs import capture
from tests.gpu.measures import Result, Skipped, try_each

MODELS = ("resnet50", "efficientnet_b0")
TINY = ("test_resnet", "test_efficientnet")
MAIN = ("cn", "cn-x")
EAGER, GRAPH, COMPILED = "eager", "CUDA graph", "compiled"
Step = Callable[[], Result]


def time_model(
    name: str, batch: int, names: Sequence[str], way: str, device: torch.device
) -> Result:
    """Measure under bfloat16 autocast, channels_last, with a step of SGD; labels on the device."""
    if way != EAGER and device.type != "cuda":
        raise Skipped(f"{way}: timed on a CUDA device")
    few = device.type == "cpu"
    side, repeats = (32, 2) if few else (224, 10)
    layout = torch.channels_last
    base = make_model(name).to(device, memory_format=layout)
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
    labels = torch.arange(batch, device=device) % 4

    def load(method: str) -> Load:
        model = base if method == BASE else methods.convert(base, method, 4, verify=False)
        made = Load(model, images, labels, way == COMPILED, True)
        made.train()
        return made

    # Converted first: what the base learns in a step is no part of the others.
    loads, failed = try_each({n: partial(load, n) for n in (*names, BASE)})
    loads = {n: loads[n] for n in (BASE, *names) if n in loads}
    measured: Result = {}
    for what in ("train", "eval"):
        cases = {n: getattr(each, what) for n, each in loads.items()}
        if way == GRAPH:
            cases, failures = try_each({n: partial(capture, c) for n, c in cases.items()})
            failed |= failures
        times = interleave(cases, device, repeats, calls=1 if few else 2)
        measured[f"{what}, ms"] = {**{n: t._asdict() for n, t in times.items()}, **failed}
        cases.clear()
    if way != GRAPH:
        peaks, failures = try_each(
            {n: partial(peak_bytes, e.train, device) for n, e in loads.items()}
        )
        peak = {n: {"median": round(bytes / 2**20, 1)} for n, bytes in peaks.items()}
        measured["peak of a step, MB"] = {**peak, **failures}
    return measured


def steps(device: torch.device) -> dict[str, Step]:
    """Return what is timed as it is, and in CUDA graphs."""
    cpu = device.type == "cpu"
    resnet, efficientnet = TINY if cpu else MODELS
    small, large = (4, 8) if cpu else (32, 256)
    others = [name for name in normswap.methods() if name not in MAIN]
    planned = [
        (resnet, small, MAIN, EAGER),
        (resnet, large, MAIN, EAGER),
        (resnet, small, MAIN, GRAPH),
        (efficientnet, small, MAIN, EAGER),
        (efficientnet, large, MAIN, EAGER),
        (efficientnet, small, MAIN, GRAPH),
        (resnet, small, others, EAGER),
    ]
    return _named(planned, device)


def compiled_steps(device: torch.device) -> dict[str, Step]:
    """Return what is timed under torch.compile, which takes a minute for each model."""
    if device.type == "cpu":
        return _named([(TINY[0], 4, ("cn",), COMPILED)], device)
    return _named([(name, 32, MAIN, COMPILED) for name in MODELS], device)


def _named(
    planned: list[tuple[str, int, Sequence[str], str]], device: torch.device
) -> dict[str, Step]:
    return {
        f"{name} batch {batch} {way}{'' if names is MAIN else ', others'}": partial(
            time_model, name, batch, names, way, device
        )
        for name, batch, names, way in planned
    }
