"""Time several callables side by side, and measure the peak memory of one."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Milliseconds: the median of the repeats, and their quartiles."""

    median: float
    low: float
    high: float


def interleave(
    cases: dict[str, Callable[[], object]], device: torch.device, repeats: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Time each case once in turn, `repeats` times, so that all meet the same machine.

    On a machine with other work only the ratios mean something, and medians of many repeats.
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            synchronize(device)
            start = time.perf_counter()
            case()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: _summarize(values) for name, values in seconds.items()}


def _summarize(seconds: list[float]) -> Timing:
    values = sorted(1e3 * s for s in seconds)
    quarter = len(values) // 4
    return Timing(statistics.median(values), values[quarter], values[-1 - quarter])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(case: Callable[[], object], device: torch.device) -> int:
    """Return the most memory a call held at one time above what was held before it."""
    case()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        case()
    held = peak = 0
    # torch keeps no peak for the CPU, but its profiler sees every allocation in order.
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
