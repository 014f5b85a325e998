"""Whether a forward runs inside backward: gradient checkpointing computes it a second time."""

import torch


def in_backward() -> bool:
    """Return whether autograd's engine is running this code.

    A forward that runs there is a recomputation, by `torch.utils.checkpoint` of either kind or by
    a reversible block: what it should do once a step, its first run did. Compiled code says False:
    the compiler recomputes values alone, never updates of buffers.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
