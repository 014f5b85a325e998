"""Time several callables side by side, and measure the peak memory of one."""

from __future__ import annotations

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
    cases: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 20,
    warmup: int = 3,
    calls: int = 1,
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
    return {name: _summarize(values) for name, values in times.items()}


def _time(case: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the milliseconds of several calls; those of the device, where it is a GPU."""
    synchronize(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    begin = time.perf_counter()
    for _ in range(calls):
        case()
    if device.type == "cuda":
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    return 1e3 * (time.perf_counter() - begin)


def _summarize(milliseconds: list[float]) -> Timing:
    values = sorted(milliseconds)
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
