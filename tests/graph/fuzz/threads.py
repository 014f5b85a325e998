"""Two threads in one model."""

import threading
from typing import Any

import torch

from tests.graph.fuzz.program import Call
from tests.graph.fuzz.sides import NAMES, Converted
from tests.graph.fuzz.tensors import images


def call_at_once(world: Converted, call: Call, results: dict[int, Any]) -> None:
    """Call the model in a thread for each label; fill in what came out, or the error."""
    barrier = threading.Barrier(len(NAMES))

    def work(k: int) -> None:
        try:
            given, _ = world.given(Call(labels=(k,)))
            barrier.wait(10)
            with torch.no_grad():
                for _ in range(3):
                    x = images(call.batch, call.size)
                    results[k] = world.evaluate(call.expression, x, given), x
        except Exception as error:
            results[k] = error

    world.model.eval()
    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(NAMES))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
