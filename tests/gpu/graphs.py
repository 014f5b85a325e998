"""CUDA graphs of anything that can be called."""

from collections.abc import Callable
from typing import Any

import torch


def capture(case: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
    """Return what replays a call, and gives what it returned: tensors that a replay overwrites.

    The call runs a few times before, on a stream of its own, as what is captured has to.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            case()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = case()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
