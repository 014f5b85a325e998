"""What layers cost the host on a GPU, without one: a CPU's time where their kernels do nothing.

Inputs are so small that BatchNorm's own kernel takes no time either. Time of the process, which
what else runs beside it disturbs least, of a layer in a stack, in microseconds; the least of all
rounds.
"""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

import normswap
from normswap.functional import backend

LAYERS, REPEATS = 20, 50


class _Compiled(dict[Any, Any]):
    """What `launching` knows of every kernel: a program that does nothing."""

    def get(self, key: Any, default: Any = None) -> Any:
        return (None, lambda *given: None, None, None, (), None, None)


def _works(*what: object) -> bool:
    """Say so at once, which a mock does not."""
    return True


def clock(run: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(REPEATS):
        run()
    return (time.process_time() - start) / REPEATS / LAYERS * 1e6


def measure_host(method: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the time of BatchNorm and of a method, in a training step and in a forward in eval."""
    from normswap.functional.triton import launching

    base = nn.Sequential(*(nn.BatchNorm2d(16) for _ in range(LAYERS)))
    given = {"contexts": 4} if method in ("cn", "cn-x") else {}
    model = normswap.convert(base, method, select="*", **given)
    labels = {"context": torch.randint(4, (32,))} if given else {}
    x = torch.randn(32, 16, 1, 1)

    def step(net: nn.Module, **labels: Any) -> None:
        net(x, **labels).sum().backward()

    def infer(net: nn.Module, **labels: Any) -> None:
        with torch.no_grad():
            net(x, **labels)

    found = {}
    for name, run in (("training step", step), ("eval", infer)):
        base.train(run is step), model.train(run is step)
        run(model, **labels)  # where its rows are measured, kernels have to do something
        with (
            mock.patch.object(backend, "DEVICES", ("cpu",)),
            mock.patch.object(backend, "_works", _works),
            mock.patch.object(launching, "_COMPILED", _Compiled()),
        ):
            run(model, **labels)
            pairs = [
                (clock(lambda: run(base)), clock(lambda: run(model, **labels)))  # noqa: B023
                for _ in range(rounds)
            ]
        base_times, times = zip(*pairs, strict=True)
        found[name] = min(base_times), min(times)
    return found
