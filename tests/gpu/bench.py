"""`python -m tests.gpu.bench PART --device D --journal FILE`: the times, without pytest.

A step is measured in one process with its cases in turn. A case that fails is left out of the
others' times, and says why.
"""

import argparse
import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.bench import interleave
from recipes.common.training import wait_for
from tests.bench.layers import SHAPES, make_cases
from tests.gpu import models
from tests.gpu.graphs import capture
from tests.gpu.journal import FAILED, PASSED, SKIPPED, Journal
from tests.gpu.measures import Cases, Result, Skipped, leave_if_poisoned, try_each

TINY = ((4, 8, 6, 6),)
SETTINGS = {"fp32 contiguous": (torch.float32, "ct"), "bf16 channels_last": (torch.bfloat16, "cl")}
Step = Callable[[], Result]
GRAPH = models.GRAPH


def layer_cases(
    shape: tuple[int, ...], setting: str, training: bool, device: torch.device
) -> Cases:
    """Return the layers but the loop over contexts, which waits for the device."""
    dtype, layout = SETTINGS[setting]
    cases = make_cases(shape, layout, training, device, (4,), dtype=dtype)
    return {name: case for name, case in cases.items() if not name.startswith("loop")}


def layer_steps(device: torch.device) -> dict[str, Step]:
    """Return the steps of one layer at a time; ratios are to BatchNorm."""
    steps: dict[str, Step] = {}
    shapes = TINY if device.type == "cpu" else SHAPES
    for graphed in (False, True):
        for setting in reversed(SETTINGS):
            for shape in shapes:
                for training in (True, False):
                    what = f"{'train' if training else 'eval'}{f', {GRAPH}' if graphed else ''}"
                    name = f"{'x'.join(map(str, shape))} {setting} {what}"
                    given = (shape, setting, training, device)
                    steps[name] = lambda given=given, graphed=graphed: time_layers(*given, graphed)
        for setting in SETTINGS if not graphed else ():
            name = f"{'x'.join(map(str, shapes[0]))} {setting} kernels"
            steps[name] = lambda setting=setting: count_kernels(shapes[0], setting, device)
    return steps


def time_layers(
    shape: tuple[int, ...], setting: str, training: bool, device: torch.device, graphed: bool
) -> Result:
    if graphed and device.type != "cuda":
        raise Skipped("CUDA graphs need a CUDA device")
    cases = layer_cases(shape, setting, training, device)
    if graphed:
        cases, failed = try_each({name: lambda c=c: capture(c) for name, c in cases.items()})
    else:
        failed = try_each(cases)[1]
        cases = {name: case for name, case in cases.items() if name not in failed}
    few = device.type == "cpu"
    times = interleave(cases, device, 3 if few else 20, calls=1 if few else 10)
    return {"ms": {**{name: t._asdict() for name, t in times.items()}, **failed}}


def count_kernels(shape: tuple[int, ...], setting: str, device: torch.device) -> Result:
    """Count what a step of each layer launches; its names tell whose kernels serve."""
    if device.type != "cuda":
        raise Skipped("kernels are counted on a CUDA device")
    result: Result = {}
    for training in (True, False):
        cases = layer_cases(shape, setting, training, device)
        counts, failed = try_each({n: lambda c=c: kernels_of(c, device) for n, c in cases.items()})
        found = {n: {"median": sum(c.values()), "kernels": dict(c)} for n, c in counts.items()}
        result["training" if training else "eval"] = {**found, **failed}
    return result


def kernels_of(case: Callable[[], object], device: torch.device) -> Counter[str]:
    for _ in range(3):
        case()
    wait_for(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        case()
        wait_for(device)
    on_device = torch.autograd.DeviceType.CUDA
    return Counter(e.name[:120] for e in profile.events() if e.device_type == on_device)


STEPS: dict[str, Callable[[torch.device], dict[str, Step]]] = {
    "layers": layer_steps,
    "models": models.steps,
    "models-compiled": models.compiled_steps,
}


def run(steps: dict[str, Step], journal: Journal) -> None:
    """Run the steps that an earlier process did not."""
    journal.plan(list(steps))
    ended = journal.ended()
    for name, step in steps.items():
        if name in ended:
            continue
        journal.start(name)
        begin = time.monotonic()
        more: dict[str, Any] = {}
        try:
            more["result"] = step()
            outcome, why = PASSED, ""
        except Skipped as skipped:
            outcome, why = SKIPPED, str(skipped)
        except Exception as error:
            outcome, why = FAILED, f"{type(error).__name__}: {error}"
            more["text"] = traceback.format_exc()
        journal.end(name, outcome, why, seconds=round(time.monotonic() - begin, 3), **more)
        leave_if_poisoned()
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bench", description=__doc__)
    parser.add_argument("part", choices=STEPS)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    options = parser.parse_args()
    steps = STEPS[options.part](options.device)
    if options.eager:
        steps = {name: step for name, step in steps.items() if GRAPH not in name}
    run(steps, Journal(options.journal))


if __name__ == "__main__":
    main()
